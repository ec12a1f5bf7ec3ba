"""Projected images are orthogonal to what a linear model sees in them, and a class-wise poison is gone."""

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from jcdp_diffusers import countermeasures
from jcdp_diffusers.countermeasures import orthogonal_projection
from jcdp_diffusers.countermeasures.orthogonal_projection import OrthogonalProjection, fit_linear, orthonormal_basis


@pytest.fixture(scope="module")
def hook(train):
    """Fitted to the digits, as published."""
    (hook,) = countermeasures.get("orthogonal-projection").prepare(train).hooks
    return hook


def classwise_poison(data, size=24):
    """The same noise for all images of a class."""
    noise = np.random.default_rng(0).integers(-size, size + 1, (10, *data.images.shape[1:]))
    return data.with_images((data.images + noise[data.labels]).clip(0, 255).astype(np.uint8))


def projected(data, hook):
    return hook.before_augmentation(torch.from_numpy(data.images).permute(0, 3, 1, 2), None)


def test_projected_images_are_orthogonal_to_the_weights(train, hook):
    images, labels = train.tensor(), torch.from_numpy(train.labels)
    weights = fit_linear(images, labels, 10)
    products = projected(train, hook).flatten(1) @ weights.T
    assert products.abs().max() < 1e-4 * (images.flatten(1) @ weights.T).abs().max()


def test_basis_is_orthonormal_and_spans_the_weights(train):
    weights = fit_linear(train.tensor(), torch.from_numpy(train.labels), 10)
    basis = orthonormal_basis(weights)
    torch.testing.assert_close(basis @ basis.T, torch.eye(10), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights @ basis.T @ basis, weights, atol=1e-5, rtol=1e-3)


def test_the_mean_image_stays(train, hook):
    """A victim is tested on images that nobody projects, so the projected ones must not lose their brightness."""
    mean = train.tensor().mean(0)
    kept = projected(train, hook).mean(0)
    assert (kept - mean).norm() < 0.3 * mean.norm()


def test_projection_is_the_nearest_orthogonal_image(train, generator):
    """Against least squares: the residual of fitting an image by the weights."""
    weights = torch.randn(4, 768, generator=generator)
    hook = OrthogonalProjection(orthonormal_basis(weights))
    pixels = train.tensor().flatten(1)[:5]
    fit = torch.linalg.lstsq(weights.T, pixels.T).solution
    torch.testing.assert_close(
        projected(train.subset(range(5)), hook).flatten(1), pixels - (weights.T @ fit).T, atol=1e-4, rtol=0
    )


def test_projecting_twice_is_projecting_once_and_floats_stay_floats(train, hook):
    once = projected(train, hook)
    assert once.is_floating_point() and once.shape == (160, 3, 16, 16)
    torch.testing.assert_close(hook.before_augmentation(once, None), once, atol=1e-5, rtol=0)


def test_a_class_wise_poison_is_no_longer_what_a_linear_model_sees(train):
    poisoned = classwise_poison(train)
    (hook,) = countermeasures.get("orthogonal-projection").prepare(poisoned).hooks

    def poison_found(images):
        """How well the classes' mean perturbation, which is known here, tells the images' classes."""
        means = (poisoned.tensor() - train.tensor()).flatten(1)
        classes = torch.stack([means[train.labels == label].mean(0) for label in range(10)])
        return ((images.flatten(1) @ classes.T).argmax(1) == torch.from_numpy(train.labels)).float().mean()

    before, after = (means_free(images) for images in (poisoned.tensor(), projected(poisoned, hook)))
    assert poison_found(before) > 0.9 > 0.6 > poison_found(after)


def means_free(images):
    return images - images.mean(0)


def test_linear_model_agrees_with_scikit_learn_on_what_is_separable(train):
    """The published number of steps does not converge, but sees the poison that logistic regression sees."""
    poisoned = classwise_poison(train)
    pixels, labels = poisoned.tensor().flatten(1), torch.from_numpy(train.labels)
    reference = LogisticRegression(fit_intercept=False, max_iter=200).fit(pixels, labels)
    assert reference.score(pixels, labels) == 1
    weights = fit_linear(poisoned.tensor(), labels, 10)
    assert (F.linear(pixels, weights).argmax(1) == labels).float().mean() > 0.95


def test_it_is_fitted_at_its_place_in_the_order(train, monkeypatch):
    monkeypatch.setattr(orthogonal_projection, "STEPS", 50)
    monkeypatch.setattr(orthogonal_projection, "EPOCHS", 1)
    squeezed = countermeasures.get("bdr-2").prepare(train).data
    fitted = {
        name: countermeasures.get(name).prepare(train).hooks[0].basis
        for name in ("orthogonal-projection", "orthogonal-projection+bdr-2", "bdr-2+orthogonal-projection")
    }
    on_squeezed = countermeasures.get("orthogonal-projection").prepare(squeezed).hooks[0].basis
    assert torch.equal(fitted["orthogonal-projection+bdr-2"], fitted["orthogonal-projection"])
    assert torch.equal(fitted["bdr-2+orthogonal-projection"], on_squeezed)
    assert not torch.equal(on_squeezed, fitted["orthogonal-projection"])


def test_rows_that_are_sorted_by_class_do_not_make_batches_of_one_class(train, monkeypatch):
    """As folders of classes give them. Rows in another order are fitted in that order, as published."""
    fitted = []

    def fit(images, labels, num_classes, *, seed):
        fitted.append((images, labels))
        return fit_linear(images, labels, num_classes, seed=seed)

    monkeypatch.setattr(orthogonal_projection, "fit_linear", fit)
    by_class = train.subset(np.argsort(train.labels, kind="stable"))
    for data in (train, by_class):
        countermeasures.get("orthogonal-projection").prepare(data)
    (as_given, labels), (shuffled, their_labels) = fitted
    assert torch.equal(as_given, train.tensor()) and labels.tolist() == train.labels.tolist()
    assert len(set(their_labels[:20].tolist())) > 4
    told = {image.numpy().tobytes(): label for image, label in zip(by_class.tensor(), by_class.labels.tolist())}
    assert [told[image.numpy().tobytes()] for image in shuffled] == their_labels.tolist()


def test_fit_is_a_function_of_data_and_seed(train, monkeypatch):
    monkeypatch.setattr(orthogonal_projection, "STEPS", 50)
    monkeypatch.setattr(orthogonal_projection, "EPOCHS", 1)

    def basis(data=train, seed=0):
        return countermeasures.get("orthogonal-projection").prepare(data, seed=seed).hooks[0].basis

    assert torch.equal(basis(), basis())
    assert not torch.equal(basis(), basis(seed=1))
    assert not torch.equal(basis(), basis(dataclasses.replace(train, labels=train.labels[::-1].copy())))
