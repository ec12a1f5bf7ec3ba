"""Learning without labels: losses against loops, networks that follow, queues, views, and what is learned."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from digits import as_tensors, digits, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from jcdp_diffusers.devices import seeded
from jcdp_diffusers.victims import Recipe, get_recipe, linear_probe, predict, train_model, train_victim, training
from jcdp_diffusers.victims.contrastive import (
    METHODS,
    Views,
    info_nce,
    negative_cosine,
    nt_xent,
)
from jcdp_diffusers.victims.evaluation import features
from jcdp_diffusers.victims.linear_probe import fit_probe
from jcdp_diffusers.victims.networks import resnet18
from jcdp_diffusers.victims.recipes import CONTRASTIVE, CONTRASTIVE_RECIPES
from jcdp_diffusers.victims.training import Hooks


SIZE = (8, 8)


def quick(method, **changes):
    changes = {"width": 4, "max_steps_per_epoch": 3} | changes
    return dataclasses.replace(get_recipe("smoke", method), **changes)


def objective_of(method, hooks=None, **changes):
    with seeded(0):
        network = resnet18(10, in_channels=1, width=4)
        return METHODS[method](network, quick(method, **changes), SIZE, hooks)


def small(start, stop):
    return digits(start, stop, enlarge=1)


@pytest.fixture(scope="module")
def sets():
    return {"train": small(0, 80), "test": small(200, 300), "probe": small(80, 200)}


# --------------------------------------------------------------------------------------------------------------- losses


def unit(vector):
    return vector / math.sqrt(sum(value**2 for value in vector))


def test_nt_xent_equals_its_formula_in_loops():
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(2, 5, 3))
    views = [unit(row) for row in (*first, *second)]
    total = 0
    for row in range(10):
        partner = (row + 5) % 10
        others = [math.exp(views[row] @ views[other] / 0.5) for other in range(10) if other != row]
        total -= math.log(math.exp(views[row] @ views[partner] / 0.5) / sum(others))
    loss = nt_xent(torch.from_numpy(first), torch.from_numpy(second), 0.5)
    assert loss.item() == pytest.approx(total / 10)


def test_nt_xent_of_orthogonal_images():
    """Equal views, all others at right angles: log(1 + (2B - 2) exp(-1 / temperature))."""
    views = torch.eye(6, dtype=torch.float64)
    expected = math.log(1 + 10 * math.exp(-1 / 0.2))
    assert nt_xent(3 * views, views, 0.2).item() == pytest.approx(expected)


def test_info_nce_equals_its_formula_in_loops():
    draw = np.random.default_rng(1)
    queries = draw.normal(size=(4, 3))
    keys, queue = [np.stack([unit(row) for row in draw.normal(size=(count, 3))]) for count in (4, 7)]
    total = 0
    for query, key in zip(queries, keys):
        own = math.exp(unit(query) @ key / 0.2)
        total -= math.log(own / (own + sum(math.exp(unit(query) @ other / 0.2) for other in queue)))
    loss = info_nce(*map(torch.from_numpy, (queries, keys, queue)), 0.2)
    assert loss.item() == pytest.approx(total / 4)


def test_negative_cosine_equals_its_formula_in_loops():
    draw = np.random.default_rng(2)
    first, second = draw.normal(size=(2, 4, 3))
    loss = negative_cosine(torch.from_numpy(first), torch.from_numpy(second))
    assert loss.item() == pytest.approx(-np.mean([unit(a) @ unit(b) for a, b in zip(first, second)]))


@pytest.mark.parametrize("method", ["moco-v2", "byol"])
@pytest.mark.parametrize("through_targets", [False, True])
def test_the_second_networks_view_has_a_gradient_where_it_is_asked_for(method, through_targets):
    objective = objective_of(method).eval()
    objective.through_targets = through_targets
    first, second = torch.rand(2, 8, 1, *SIZE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(objective.between(first, second), second, allow_unused=True)

    def followed(view):
        network, head = objective.followers
        with torch.set_grad_enabled(through_targets):
            return head(network.features(view))

    features = [objective.network.features(view) for view in (first, second)]
    if method == "moco-v2":
        keys = F.normalize(followed(second), dim=1)
        loss = info_nce(objective.head(features[0]), keys, objective.queue, 0.2) * 0.2 / 0.07
    else:
        predicted = [objective.predictor(objective.projector(part)) for part in features]
        loss = sum(negative_cosine(*pair) for pair in zip(predicted, (followed(second), followed(first)))) / 2
    (expected,) = torch.autograd.grad(loss, second, allow_unused=True)
    if method == "moco-v2" and not through_targets:
        assert gradient is None and expected is None
    else:
        torch.testing.assert_close(gradient, expected)
    objective.between(first, second).backward()
    assert all(parameter.grad is None for parameter in objective.followers.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_two_views_from_the_networks_parts(method):
    objective = objective_of(method)
    first, second = torch.rand(2, 8, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    other = copy.deepcopy(objective)
    network = other.network
    if method == "simclr":
        projections = other.head(network.features(torch.cat([first, second])))
        expected = nt_xent(projections[:8], projections[8:], 0.5) * 0.5 / 0.07
    elif method == "moco-v2":
        keys = F.normalize(other.followers[1](other.followers[0].features(second)), dim=1)
        expected = info_nce(other.head(network.features(first)), keys, other.queue, 0.2) * 0.2 / 0.07
    else:
        predicted = [other.predictor(other.projector(network.features(view))) for view in (first, second)]
        targets = [other.followers[1](other.followers[0].features(view)) for view in (first, second)]
        expected = (negative_cosine(predicted[0], targets[1]) + negative_cosine(predicted[1], targets[0])) / 2
    loss = objective.between(first, second)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    learned = {name for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert not any(name.startswith("followers") for name in learned)
    assert any(name.startswith("network.conv1") for name in learned)


# ------------------------------------------------------------------------------------------------- followers and queues


@pytest.mark.parametrize("method", ["moco-v2", "byol"])
def test_a_follower_is_a_moving_average(method):
    """A leader that stands still is reached as 1 - momentum^steps."""
    objective = objective_of(method, key_momentum=0.9)
    before = [parameter.clone() for parameter in objective.followers.parameters()]
    leaders = [objective.network, objective.head if method == "moco-v2" else objective.projector]
    goals = [parameter for leader in leaders for parameter in leader.parameters()]
    with torch.no_grad():
        for goal in goals:
            goal.add_(1)
    objective.new_keys = torch.zeros(0, 128)
    for _ in range(3):
        objective.after_step()
    for now, start, goal in zip(objective.followers.parameters(), before, goals, strict=True):
        torch.testing.assert_close(now, goal + 0.9**3 * (start - goal))
        assert not now.requires_grad


def test_the_queue_forgets_the_oldest_keys():
    objective = objective_of("moco-v2", queue=24)
    first, second = torch.rand(2, 8, 1, *SIZE)
    seen = []
    for _ in range(4):
        before = objective.queue.clone()
        objective.between(first, second)
        objective.between(first, second)
        assert torch.equal(objective.queue, before)  # keys enter it after a step, once, however often a loss is taken
        seen.append(objective.new_keys)
        objective.after_step()
    assert torch.equal(objective.queue, torch.cat([seen[3], seen[1], seen[2]]))
    assert objective.position == 8
    torch.testing.assert_close(objective.queue.norm(dim=1), torch.ones(24))


# ---------------------------------------------------------------------------------------------------------------- views


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_images_of_their_own(channels):
    images = torch.rand(1, channels, 12, 10).expand(16, -1, -1, -1)
    views = Views((12, 10))
    shown = views(images, torch.Generator().manual_seed(0))
    assert shown.shape == images.shape and 0 <= shown.min() and shown.max() <= 1
    assert len({view.numpy().tobytes() for view in shown}) > 12  # a few are the same crop, plain
    assert torch.equal(shown, views(images, torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(views(images, generator), views(images, generator))


def test_views_leave_the_global_state_alone():
    state = torch.get_rng_state()
    Views(SIZE)(torch.rand(2, 3, *SIZE, generator=torch.Generator()), torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_views_pass_gradients():
    images = torch.rand(4, 3, *SIZE, requires_grad=True)
    Views(SIZE)(images, torch.Generator().manual_seed(0)).sum().backward()
    assert (images.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_what_colours_do():
    images = torch.rand(400, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    grey = Views(SIZE)(images, torch.Generator().manual_seed(0))
    assert 0.12 < (grey.std(dim=1).amax(dim=(1, 2)) < 1e-6).float().mean() < 0.28
    plain = Views(SIZE, colour=False, flip=False, min_scale=1.0)(torch.full((8, 3, *SIZE), 0.25), torch.Generator())
    torch.testing.assert_close(plain, torch.full((8, 3, *SIZE), 0.25))


def test_views_of_grey_images_are_those_of_their_colour_copies():
    images = torch.rand(6, 1, *SIZE)
    grey = Views(SIZE)(images, torch.Generator().manual_seed(3))
    colour = Views(SIZE)(images.expand(-1, 3, -1, -1), torch.Generator().manual_seed(3))
    torch.testing.assert_close(grey.expand(-1, 3, -1, -1), colour, rtol=0, atol=1e-5)


def test_half_of_the_views_are_mirrored_or_none():
    ramp = torch.linspace(0, 1, 8).expand(400, 3, 8, 8)

    def mirrored(**options):
        views = Views(SIZE, colour=False, **options)(ramp, torch.Generator().manual_seed(0))
        return (views[:, 0, :, 0].mean(1) > views[:, 0, :, -1].mean(1)).float().mean()

    assert abs(mirrored() - 0.5) < 0.1
    assert mirrored(flip=False) == 0


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(
    "method, changes",
    [
        ("simclr", {"epochs": 8, "learning_rate": 0.1, "knn_evaluations": 1}),
        pytest.param("moco-v2", {"epochs": 25}, marks=pytest.mark.long),
        pytest.param("byol", {"epochs": 15}, marks=pytest.mark.long),
    ],
)
def test_learns_digits_without_labels(method, changes):
    """A probe of 100 labelled digits gains at least 8 points over one on the features that training starts from."""
    train, probe, test = small(0, 800), small(800, 900), small(900, 1797)
    recipe = dataclasses.replace(get_recipe("digits", method), **changes)
    with seeded(0):
        untrained = resnet18(10, in_channels=1, width=recipe.width)
    images, labels = as_tensors(test)
    fit_probe(untrained, *as_tensors(probe), images, labels)
    before = (predict(untrained, images).argmax(1) == labels).float().mean().item()
    result = train_victim(dataclasses.replace(train, labels=None), test, method=method, probe=probe, recipe=recipe)
    assert result.accuracy > before + 0.08
    assert result.knn_accuracy > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_result_describes_itself(method, sets):
    result = train_victim(**sets, method=method, recipe=quick(method, epochs=3, knn_evaluations=2))
    images, labels = as_tensors(sets["test"])
    right = predict(result.model, images).argmax(1) == labels
    assert result.accuracy == pytest.approx(right.float().mean().item())
    assert result.confusion.sum() == 100 and np.trace(result.confusion) == right.sum()
    assert result.train_accuracy is None and result.best_accuracy is None
    assert [entry["epoch"] for entry in result.history if "knn_accuracy" in entry] == [1, 2, 3]
    assert result.knn_accuracy == result.history[-1]["knn_accuracy"]
    assert result.settings["method"] == method and result.settings["probe_images"] == 120
    assert result.settings["smoke"] and not result.model.training


@pytest.mark.parametrize("method", METHODS)
def test_labels_are_never_used(method, sets):
    other = dataclasses.replace(sets["train"], labels=sets["train"].labels[::-1].copy())
    results = [
        train_victim(**sets | {"train": data}, method=method, recipe=quick(method, epochs=1, max_steps_per_epoch=1))
        for data in (sets["train"], other, dataclasses.replace(other, labels=None))
    ]
    assert torch.equal(weights(results[0].model), weights(results[1].model))
    assert torch.equal(weights(results[0].model), weights(results[2].model))


@pytest.mark.parametrize("method", METHODS)
def test_a_training_that_was_cut_off_ends_with_the_same_weights(method, sets, tmp_path):
    options = {**sets, "method": method, "recipe": quick(method, epochs=2), "seed": 2}
    state = torch.get_rng_state()
    whole = train_victim(**options)
    assert torch.equal(torch.get_rng_state(), state)

    def cut_off(entry):
        if entry["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_victim(**options, checkpoint_dir=tmp_path, progress=cut_off)
    seen = []
    rest = train_victim(**options, checkpoint_dir=tmp_path, progress=seen.append)
    assert [entry["epoch"] for entry in seen] == [2]
    assert torch.equal(weights(rest.model), weights(whole.model))
    for mine, theirs in zip(rest.history, whole.history, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    other = train_victim(**options | {"seed": 3})
    assert not torch.equal(weights(other.model), weights(whole.model))
    for role in ("probe", "test"):  # of which the kept figures are not
        with pytest.raises(ValueError, match="it holds one with another evaluation"):
            train_victim(**options | {role: sets[role].subset(range(1, len(sets[role])))}, checkpoint_dir=tmp_path)


def longer(path, seconds, **request):
    """Makes a checkpoint one whose epochs took longer, or of another request."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["training"])
    for entry in facts["history"]:
        entry["seconds"] += seconds
    facts["request"] |= request
    save_file(load_file(path), path, metadata={"training": json.dumps(facts)})


def test_seconds_before_a_training_or_its_probe_was_cut_off_count(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(linear_probe, "CP", dataclasses.replace(linear_probe.CP, epochs=2))
    recipe = quick("simclr", epochs=2, max_steps_per_epoch=1, probe="cp")
    options = {**sets, "method": "simclr", "recipe": recipe, "checkpoint_dir": tmp_path}
    assert train_victim(**options).seconds < 100
    longer(tmp_path / "training.safetensors", 1000)
    assert 1000 < train_victim(**options).seconds < 1100
    longer(tmp_path / "probe/training.safetensors", 500)
    assert 1500 < train_victim(**options).seconds < 1600
    longer(tmp_path / "training.safetensors", 0, device="cuda")
    with pytest.raises(ValueError, match="another device, cuda instead of cpu"):
        train_victim(**options)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_accuracy_of_a_probe_is_that_by_which_its_best_epoch_is_found(seed, sets, monkeypatch):
    """Where convolutions run in bfloat16, too."""
    monkeypatch.setattr(training, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(linear_probe, "CP", dataclasses.replace(linear_probe.CP, epochs=1, learning_rate=1e-3))
    recipe = quick("simclr", epochs=1, max_steps_per_epoch=1, probe="cp", bfloat16=True)
    result = train_victim(**sets, method="simclr", recipe=recipe, seed=seed)
    assert result.accuracy == pytest.approx(result.best_accuracy)
    assert result.accuracy == np.trace(result.confusion) / 100


def test_features_without_the_last_layer(sets):
    network = resnet18(10, in_channels=1, width=4).train()
    images, _ = as_tensors(sets["test"])
    found = features(network, images, batch_size=30)
    assert found.shape == (100, 32) and network.training
    torch.testing.assert_close(network.eval().fc(found), predict(network, images), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("method", METHODS)
def test_hooks_see_each_view(method, sets):
    calls = []

    class Watcher:
        def before_augmentation(self, images, generator):
            calls.append(("stored", images.dtype, len(images)))
            return images

        def before_forward(self, images, labels, generator):
            assert labels is None and isinstance(generator, torch.Generator)
            calls.append(("view", images.dtype, len(images)))
            return images * 0, labels

    recipe = quick(method, epochs=1, max_steps_per_epoch=1)
    train_victim(**sets, method=method, recipe=recipe, hooks=[Watcher()])
    assert calls == [("stored", torch.uint8, 8), ("view", torch.float32, 8), ("view", torch.float32, 8)]


def test_a_hook_may_replace_the_loss(sets):
    class Both:
        def contrastive_loss(self, objective, images, targets, generator):
            assert images.dtype == torch.float32 and 0 <= images.min() and images.max() <= 1
            return objective.between(objective.view(images, generator), objective.view(images, generator))

    options = {**sets, "method": "simclr", "recipe": quick("simclr", epochs=1)}
    same = train_victim(**options, hooks=[Both()])
    assert torch.equal(weights(same.model), weights(train_victim(**options).model))
    with pytest.raises(ValueError, match="hooks holds Both and Both"):
        Hooks([Both(), Both()])


def test_a_hook_for_another_way_of_learning_is_refused(sets):
    class Adversarial:
        def loss(self, model, images, labels, generator):
            return model(images).sum()

    class Contrasting:
        def contrastive_loss(self, objective, images, targets, generator):
            return images.sum()

    with pytest.raises(ValueError, match="hooks holds a Adversarial.*'byol'"):
        train_victim(**sets, method="byol", recipe=quick("byol"), hooks=[Adversarial()])
    images, labels = as_tensors(sets["probe"])
    recipe = Recipe("plain", 1)
    with pytest.raises(ValueError, match="hooks holds a Contrasting.*'supervised'"):
        train_model(resnet18(10, in_channels=1, width=2), images, labels, recipe=recipe, hooks=[Contrasting()])


# -------------------------------------------------------------------------------------------------------------- recipes


def test_recipes_of_contrastive_poisoning():
    numbers = {
        method: (recipe.learning_rate, recipe.temperature, recipe.key_momentum, recipe.queue)
        for method, recipe in ((method, get_recipe("cp", method)) for method in CONTRASTIVE)
    }
    assert numbers == {
        "simclr": (0.5, 0.5, None, None),
        "moco-v2": (0.3, 0.2, 0.99, 4096),
        "byol": (1.0, None, 0.999**2, None),  # the program's second network follows twice a step
    }
    for method in CONTRASTIVE:
        recipe = get_recipe("cp", method)
        assert (recipe.epochs, recipe.batch_size, recipe.weight_decay, recipe.probe) == (1000, 512, 1e-4, "cp")
        assert recipe.warmup * recipe.epochs == 10


def test_simclrs_gradient_is_that_of_the_released_programs_four_processes():
    """Each differentiates its own features in the loss over all of them, and the mean over processes is taken."""
    with seeded(0):
        objective = METHODS["simclr"](resnet18(10, in_channels=1, width=4), get_recipe("cp", "simclr"), SIZE)
    generator = torch.Generator().manual_seed(0)
    views = [torch.rand(8, 1, *SIZE, generator=generator) for _ in range(2)]
    weights_of = list(objective.head.parameters())
    found = torch.autograd.grad(objective.between(*views), weights_of)

    projections = F.normalize(objective.head(objective.network.features(torch.cat(views))), dim=1)
    everyone, partner = torch.arange(16), torch.arange(16).roll(8)
    mean = [torch.zeros_like(weight) for weight in weights_of]
    for process in range(4):
        own = ((everyone % 8) // 2 == process)[:, None]
        gathered = torch.where(own, projections, projections.detach())
        similar = (gathered @ gathered.T / 0.5).exp()
        others = similar.sum(dim=1) - similar.diagonal()
        loss = 0.5 / 0.07 * -(similar[everyone, partner] / others).log().mean()
        for total, gradient in zip(mean, torch.autograd.grad(loss, weights_of, retain_graph=True)):
            total += gradient / 4
    for one, other in zip(found, mean):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for name in ("fast", "mini", "digits"):  # ours, which claim no program's strength
        assert get_recipe(name, "simclr").loss_factor == 4 * objective.recipe.loss_factor


def test_every_method_has_the_same_recipes():
    names = {method: list(recipes) for method, recipes in CONTRASTIVE_RECIPES.items()}
    assert names == dict.fromkeys(CONTRASTIVE, ["cp", "fast", "mini", "digits", "smoke"])
    assert list(METHODS) == list(CONTRASTIVE)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "swav"}, "method is 'swav', .* simclr, moco-v2, byol"),
        ({"temperature": None}, "temperature is None, .* 'moco-v2'"),
        ({"key_momentum": None}, "key_momentum is None"),
        ({"queue": None}, "queue is None"),
        ({"queue": 100}, "queue is 100, .* batch_size 8"),
        ({"min_scale": 0.0}, "min_scale is 0.0"),
        ({"temperature": 0.0}, "temperature is 0.0, .* above 0"),
        ({"key_momentum": 1.5}, "key_momentum is 1.5, .* within 0 and 1"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, .* above 0"),
        ({"knn_evaluations": 0}, "knn_evaluations is 0, .* above 0"),
        ({"batch_size": 1}, "batch_size is 1"),
    ],
)
def test_recipes_that_cannot_be_followed(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(get_recipe("smoke", "moco-v2"), **changes)


# ------------------------------------------------------------------------------------------------------------ bad input


def only(data, label):
    return data.subset(data.labels == label)


@pytest.mark.parametrize(
    "changes, message",
    [
        (lambda s: {"probe": None}, "probe is None, .* 'moco-v2'"),
        (lambda s: {"probe": dataclasses.replace(s["probe"], labels=None)}, "probe has no labels"),
        (lambda s: {"probe": s["probe"].subset(s["probe"].labels != 3)}, "test has images of class 3, .* probe"),
        (lambda s: {"probe": only(s["probe"], 4), "test": only(s["test"], 4)}, "probe has labels of class 4 alone"),
        (lambda s: {"probe": digits(80, 200)}, "probe has images of shape 16x16x1, .* 8x8x1"),
        (lambda s: {"train": digits(0, 80)}, "train has images of shape 16x16x1, .* 8x8x1"),
        (lambda s: {"train": s["train"].subset(range(7))}, "train has 7 images, .* 8, the batch_size .* 'smoke'"),
        (lambda s: {"train": s["train"].subset(range(63))}, "train has 63 images, .* 64, the queue .* 'smoke'"),
        (
            lambda s: {name: data.with_images(data.images[:, :7]) for name, data in s.items()},
            "images are 7x8, .* at least 8x8",
        ),
        (lambda s: {"recipe": "iss"}, "recipe is 'iss', .* 'moco-v2'"),
        (lambda s: {"recipe": Recipe("own", 3)}, "recipe is 'own' of method 'supervised', .* 'moco-v2'"),
        (lambda s: {"recipe": quick("byol")}, "recipe is 'smoke' of method 'byol', .* 'moco-v2'"),
        (lambda s: {"method": "supervised"}, "probe has 120 images, .* 'supervised'"),
        (lambda s: {"method": "swav"}, "method is 'swav', .* supervised, simclr, moco-v2, byol"),
    ],
)
def test_errors_in_one_sentence(sets, changes, message):
    options = {**sets, "method": "moco-v2", "recipe": "smoke", "width": 2}
    with pytest.raises(ValueError, match=message):
        train_victim(**options | changes(sets))
