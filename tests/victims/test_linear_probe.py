"""Probes against scikit-learn."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from digits import as_tensors, digits
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from jcdp_diffusers.victims import RECIPES, predict, train_victim
from jcdp_diffusers.victims.linear_probe import CP, fit_probe, knn_accuracy, logistic_regression
from jcdp_diffusers.victims.networks import convnet94, resnet18


@pytest.fixture(scope="module")
def pixels():
    data = load_digits()
    return torch.from_numpy(data.data).float(), torch.from_numpy(data.target)


@pytest.mark.parametrize("classes", [2, 10])
def test_logistic_regression_is_scikit_learns(pixels, classes):
    features, labels = (part[pixels[1] < classes] for part in pixels)
    weight, bias = logistic_regression(features[:300], labels[:300], classes)
    # For two classes, scikit-learn has one row of weights, whose penalty is twice that of two opposite rows of half.
    reference = make_pipeline(
        StandardScaler(), LogisticRegression(C=2.0 if classes == 2 else 1.0, max_iter=10_000, tol=1e-8)
    )
    reference.fit(features[:300].numpy(), labels[:300].numpy())
    ours = (features @ weight.T + bias).softmax(1).numpy()
    assert ours == pytest.approx(reference.predict_proba(features.numpy()), abs=2e-3)


def test_a_class_without_images_is_never_predicted(pixels):
    features, labels = pixels
    weight, bias = logistic_regression(features, labels, 12)
    assert (features @ weight.T + bias).argmax(1).max() == 9


@pytest.mark.parametrize("count", [150, 900])
def test_nearest_neighbours_are_scikit_learns(pixels, count):
    features, labels = pixels
    reference = KNeighborsClassifier(
        min(200, count), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.1)
    )
    reference.fit(features[:count].numpy(), labels[:count].numpy())
    expected = reference.score(features[count:].numpy(), labels[count:].numpy())
    ours = knn_accuracy(features[:count], labels[:count], features[count:], labels[count:])
    assert ours == pytest.approx(expected, abs=0.002)


@pytest.fixture(scope="module")
def learned(train, test):
    recipe = dataclasses.replace(RECIPES["digits"], width=4, bfloat16=False)
    return train_victim(train, test, recipe=recipe, seed=3).model


@pytest.mark.parametrize("probe", ["fast", "cp"])
def test_a_probe_changes_the_last_layer_alone(probe, learned, tmp_path):
    network = copy.deepcopy(learned)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images, labels = as_tensors(digits(200, 300))
    test = as_tensors(digits(500, 600))
    seen = []
    best = fit_probe(network, images, labels, *test, probe=probe, progress=seen.append, checkpoint_dir=tmp_path)
    after = network.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["fc.weight", "fc.bias"]
    assert all(parameter.requires_grad for parameter in network.parameters()) and not network.training
    accuracy = (predict(network, test[0]).argmax(1) == test[1]).float().mean().item()
    assert accuracy > 0.4
    if probe == "fast":
        assert best is None and not seen
    else:
        assert len(seen) == CP.epochs == 100
        assert accuracy == pytest.approx(seen[-1]["test_accuracy"]) and best == max(e["test_accuracy"] for e in seen)


def test_a_probe_does_not_go_on_with_that_of_another_network(learned, tmp_path):
    images, labels = as_tensors(digits(200, 240))
    test = as_tensors(digits(500, 540))
    fit_probe(copy.deepcopy(learned), images, labels, *test, probe="cp", checkpoint_dir=tmp_path)
    other = copy.deepcopy(learned)
    with torch.no_grad():
        next(other.parameters()).mul_(-1)
    with pytest.raises(ValueError, match="it holds one with another evaluation"):
        fit_probe(other, images, labels, *test, probe="cp", checkpoint_dir=tmp_path)


def test_a_network_whose_last_layer_has_no_bias_is_probed_with_one(train, test):
    network = convnet94(10, in_channels=1, width=2)
    images, labels = as_tensors(train)
    network.whiten(images)
    fit_probe(network, images[:64], labels[:64], *(part[:32] for part in as_tensors(test)), probe="cp")
    assert (network.head.bias != 0).any()


def test_bad_input():
    network = resnet18(10, in_channels=1, width=2)
    images, labels = as_tensors(digits(0, 20, enlarge=1))
    with pytest.raises(ValueError, match="probe is 'slow', .* cp, fast"):
        fit_probe(network, images, labels, images, labels, probe="slow")
    with pytest.raises(ValueError, match="class 3 alone"):
        fit_probe(network, images, labels * 0 + 3, images, labels)
