"""The fast network and its training, against closed forms and plain loops."""

import copy
import dataclasses

import pytest
import torch
from digits import as_tensors, digits, weights
from torch.nn import functional as F

from jcdp_diffusers.devices import seeded
from jcdp_diffusers.victims import RECIPES, random_crop_flip, train_model, train_victim
from jcdp_diffusers.victims.airbench import Airbench, AlternatingFlip
from jcdp_diffusers.victims.networks import convnet94, resnet18
from jcdp_diffusers.victims.recipes import AirbenchRecipe
from jcdp_diffusers.victims.supervised import supervised_objective
from jcdp_diffusers.victims.training import Hooks


QUICK = AirbenchRecipe("quick", epochs=3, batch_size=32, learning_rate=0.1, width=4, bfloat16=False)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["bytes", "floats"])
def test_whitened_patches_have_unit_moments(channels, dtype):
    """W M W' = variance / (variance + 5e-4) on the diagonal, where M are the moments of the patches, W the filters."""
    images = torch.rand(60, channels, 9, 9, generator=torch.Generator().manual_seed(0)).cumsum(-1) / 9
    if dtype == "bytes":
        images = (images * 255).round().to(torch.uint8)
    network = convnet94(4, in_channels=channels, width=4)
    network.whiten(images)
    weight = network.whitening.weight
    seen = images.float() / (255 if dtype == "bytes" else 1)
    seen = (seen - network.mean) / network.std
    patches = seen.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * channels)
    moments = patches.T @ patches / len(patches)
    variances = torch.linalg.eigvalsh(moments)
    half = weight[: 4 * channels].flatten(1)
    torch.testing.assert_close(half @ moments @ half.T, (variances / (variances + 5e-4)).diag(), rtol=1e-3, atol=1e-3)
    assert torch.equal(weight[4 * channels :], -weight[: 4 * channels])
    assert not weight.requires_grad


def test_whitening_looks_at_five_thousand_images():
    images = torch.rand(5003, 1, 9, 9)
    networks = [convnet94(4, in_channels=1, width=2) for _ in range(2)]
    networks[0].whiten(images)
    networks[1].whiten(images[:5000])
    assert torch.equal(networks[0].whitening.weight, networks[1].whitening.weight)


def test_whitening_in_parts_is_that_of_all_patches_at_once():
    images = torch.rand(601, 3, 9, 9)
    network = convnet94(4, width=2)
    network.whiten(images)
    patches = F.unfold((images - network.mean) / network.std, 2).transpose(1, 2).flatten(0, 1).double()
    filters = network.whitening.weight[:12].flatten(1).double()
    second_moments = filters @ (patches.T @ patches / len(patches)) @ filters.T
    torch.testing.assert_close(second_moments, second_moments.diagonal().diag(), rtol=0, atol=1e-5)
    assert second_moments.diagonal()[-6:].sub(1).abs().max() < 0.05


def test_a_victim_whitens_its_own_images_or_others(train, test):
    def first_layer(**options):
        recipe = dataclasses.replace(RECIPES["smoke"], max_steps_per_epoch=1)
        return train_victim(train, test, victim="convnet94", width=2, recipe=recipe, **options).model.whitening.weight

    for given, options in ((train, {}), (test, {"whitening": test})):
        expected = convnet94(10, in_channels=1, width=2)
        expected.whiten(as_tensors(given)[0])
        torch.testing.assert_close(first_layer(**options), expected.whitening.weight)


def test_first_filters_pass_their_inputs_on():
    network = convnet94(4, width=16)
    maps = torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(network.groups[0].conv2(maps), maps)
    assert network.groups[1].conv1.weight[16:].abs().sum() > 0


def test_images_are_mirrored_in_turn():
    images = torch.arange(400, dtype=torch.uint8).remainder(250).view(100, 1, 1, 4)
    epochs = [mirrored_as_in(epoch, images, seed=5) for epoch in range(4)]
    mirrored = [(shown == images.flip(-1)).all(dim=(1, 2, 3)) for shown in epochs]
    for shown, flipped in zip(epochs, mirrored):
        assert torch.equal(shown[~flipped], images[~flipped])
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2]) and torch.equal(mirrored[1], mirrored[3])
    assert 30 < mirrored[0].sum() < 70
    assert not torch.equal(mirrored_as_in(0, images, seed=6), epochs[0])
    some = torch.tensor([70, 3, 41])  # an image is mirrored by its number in the set, whatever its place in the batch
    assert torch.equal(mirrored_as_in(1, images, seed=5, rows=some), epochs[1][some])


def mirrored_as_in(epoch: int, images: torch.Tensor, *, seed: int, rows: torch.Tensor | None = None) -> torch.Tensor:
    rows = torch.arange(len(images)) if rows is None else rows
    hooks = Hooks([AlternatingFlip(len(images), seed)])
    hooks.start_epoch(epoch, 4, images)
    return hooks.before_augmentation(images[rows], rows)


@pytest.mark.parametrize("draws", [1, 2, 3, 4])
def test_each_of_several_draws_is_mirrored_in_turn(draws):
    class Shown:
        def __init__(self):
            self.draws = draws

        def epoch_images(self, epoch, images):
            return images

    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4))
    hooks = supervised_objective(network, QUICK, [Shown()], 6, 0, "cpu").hooks
    images, seen = torch.arange(24).view(6, 1, 1, 4), []
    for epoch in range(3 * draws):
        hooks.start_epoch(epoch, 3 * draws, images)
        seen.append(hooks.before_augmentation(images, torch.arange(6)))
    for before, after in zip(seen, seen[draws:]):
        assert torch.equal(before, after.flip(-1))
    if draws > 1:  # and the draws of one pass are mirrored in turn as well
        assert torch.equal(seen[0], seen[1].flip(-1))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_hook_that_replaces_the_loss_gets_smoothed_labels(mixed):
    class Loss:
        def loss(self, model, images, labels, generator):
            return F.cross_entropy(model(images), labels)

    class Mixed:
        def before_forward(self, images, labels, generator):
            return images, F.one_hot(labels, 4).float().roll(1, 0) / 2 + F.one_hot(labels, 4) / 2

    images, labels = torch.rand(8, 1, 4, 4), torch.arange(8) % 4
    losses = []
    for hooks in ([], [Loss()]):
        with seeded(0):
            network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
        objective = supervised_objective(network, QUICK, [Mixed(), *hooks] if mixed else hooks, 8, 0, "cpu")
        losses.append(objective.loss(images, labels, torch.Generator().manual_seed(0)))
    torch.testing.assert_close(*losses)
    plain = dataclasses.replace(QUICK, label_smoothing=0.0)
    assert supervised_objective(network, plain, hooks, 8, 0, "cpu")._smoothed(labels) is labels


def test_what_is_fitted_to_stored_images_sees_them_before_they_are_mirrored():
    """Else an orthogonal projection would leave the protection in half of the images."""
    images = torch.arange(64, dtype=torch.uint8).view(16, 1, 1, 4)
    seen = []

    class Fitted:
        def before_augmentation(self, images, generator):
            seen.append(images)
            return images + 100

    recipe = dataclasses.replace(QUICK, epochs=2, batch_size=16, crop_padding=0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4))
    hooks = supervised_objective(network, recipe, [Fitted()], 16, 0, "cpu").hooks
    hooks.start_epoch(0, 2, images)
    shown = hooks.before_augmentation(images, torch.arange(16))
    assert torch.equal(seen[0], images)
    mirrored = (shown == images.flip(-1) + 100).all(dim=(1, 2, 3))
    assert 0 < mirrored.sum() < 16 and torch.equal(shown[~mirrored], images[~mirrored] + 100)


def test_crops_of_reflected_images():
    images = torch.arange(2 * 5 * 6, dtype=torch.uint8).view(2, 1, 5, 6)
    shown = random_crop_flip(images, torch.Generator().manual_seed(0), crop_padding=2, flip=False, padding="reflect")
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect").to(torch.uint8)
    for crop, whole in zip(shown, padded):
        places = [(top, left) for top in range(5) for left in range(5)]
        assert any(torch.equal(crop, whole[:, top : top + 5, left : left + 6]) for top, left in places)


def test_look_ahead_equals_its_formula():
    """12 steps, each adding 1 to every weight, with averages after steps 5 and 10 and the last one as it stands."""
    recipe = dataclasses.replace(QUICK, epochs=4, batch_size=8)
    network = torch.nn.BatchNorm2d(1)
    objective = Airbench(network, recipe, Hooks(), count=24)
    assert objective.total == 12
    live = average = 1.0
    for step in range(1, 13):
        with torch.no_grad():
            network.weight.add_(1)
            network.running_mean.add_(1)
        objective.after_step()
        live += 1
        if step in (5, 10):
            keep = 0.95**5 * (step / 12) ** 3
            average = keep * average + (1 - keep) * live
            live = average
        if step == 12:
            live = average
        assert network.weight.item() == pytest.approx(live)
        assert network.running_mean.item() == pytest.approx(live - 1)


def test_biases_of_batch_normalisation_learn_faster():
    network = convnet94(4, width=4)
    objective = Airbench(network, QUICK, Hooks(), count=64)
    others, biases = objective.parameter_groups(QUICK)
    assert {id(parameter) for parameter in biases["params"]} == {
        id(norm.bias) for group in network.groups for norm in (group.bn1, group.bn2)
    }
    assert (biases["lr"], biases["weight_decay"]) == (0.1 * 64, QUICK.weight_decay / 64)
    assert "lr" not in others
    assert len(others["params"]) + len(biases["params"]) == len(list(network.parameters()))


def test_one_step_is_that_of_the_authors():
    """They sum the smoothed loss over 1,024 images, with a learning rate of 0.001465 and a weight decay of 1.362."""
    images, labels = torch.rand(1024, 1, 9, 9), torch.arange(1024) % 4
    with seeded(0):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(81, 4))
    reference = copy.deepcopy(network)
    recipe = AirbenchRecipe("step", epochs=1, batch_size=1024, crop_padding=0)
    F.cross_entropy(reference(images), labels, label_smoothing=0.2, reduction="sum").backward()
    rate = 0.2 * 11.5 / (1024 * (1 + 1 / 0.15))  # the schedule begins at a fifth
    optimizer = torch.optim.SGD(reference.parameters(), rate, momentum=0.85, nesterov=True, weight_decay=1.362)
    optimizer.step()
    flipped = mirrored_as_in(0, mirrored_as_in(0, images, seed=0), seed=0)
    assert torch.equal(flipped, images)
    recipe = dataclasses.replace(recipe, look_ahead_steps=1, look_ahead_decay=0.0, bfloat16=False)
    train_model(network, mirrored_as_in(0, images, seed=0), labels, recipe=recipe)
    assert rate == pytest.approx(0.2 * 0.001465, rel=1e-3)
    torch.testing.assert_close(weights(network), weights(reference), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_images_with_large_even_areas_end_in_no_infinite_weight(train, seed):
    """Channels that are constant but for rounding; with the authors' eps, one in eight diverges."""
    images, labels = as_tensors(train)
    with seeded(seed):
        network = convnet94(10, in_channels=1, width=4)
    network.whiten(images)
    train_model(network, images, labels, recipe=dataclasses.replace(QUICK, epochs=4, look_ahead_steps=10**6))
    assert torch.isfinite(weights(network)).all()


def test_the_bias_of_whitening_is_trained_at_first(train):
    images, labels = as_tensors(train)
    network = convnet94(10, in_channels=1, width=4)
    network.whiten(images)
    seen = [network.whitening.bias.detach().clone()]
    filters = network.whitening.weight.detach().clone()
    recipe = dataclasses.replace(QUICK, epochs=4, whitening_epochs=2, look_ahead_steps=10**6)
    train_model(
        network,
        images,
        labels,
        recipe=recipe,
        after_epoch=lambda entry: seen.append(network.whitening.bias.detach().clone()),
    )
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert torch.equal(filters, network.whitening.weight)


@pytest.mark.parametrize(
    "count, batch_size, epochs", [(50_000, 1024, 10), (40_000, 1024, 10), (10_000, 256, 20), (1_300, 32, 20)]
)
def test_sizes(count, batch_size, epochs):
    recipe = RECIPES["airbench"].for_images(count)
    assert (recipe.batch_size, recipe.epochs) == (batch_size, epochs)
    assert recipe.learning_rate == 1.5 * batch_size / 1024
    # Per image and epoch, the weight decay of the authors: 0.001465 x 1.362 per 1,024 images.
    assert recipe.learning_rate * recipe.weight_decay / batch_size == pytest.approx(0.001465 * 1.362 / 1024, rel=1e-3)
    assert recipe.for_images(7) is recipe


@pytest.mark.parametrize(
    "count, batch_size, epochs",
    [
        (50_000, 1024, 10),
        (39_999, 1024, 5),
        (10_000, 256, 5),
        (5_000, 128, 10),
        (900, 32, 20),
        (128, 32, 75),
        (10, 32, 300),
    ],
)
def test_sizes_of_the_short_training(count, batch_size, epochs):
    """50,000 image passes below 40,000 images, within 5 and 20 epochs, 300 steps at least; else as the long one."""
    recipe = RECIPES["airbench-short"].for_images(count)
    assert (recipe.batch_size, recipe.epochs) == (batch_size, epochs)
    long = RECIPES["airbench"].for_images(count)
    assert dataclasses.asdict(recipe) | {"name": "", "epochs": 0} == dataclasses.asdict(long) | {
        "name": "",
        "epochs": 0,
    }
    assert recipe.for_images(7) is recipe


@pytest.mark.parametrize("size, last", [((32, 32), (3, 3)), ((9, 9), (1, 1)), ((64, 40), (7, 4))])
def test_features_are_the_largest_values_of_the_last_maps(size, last):
    """At 32x32 that is the authors' max-pooling of 3x3."""
    network = convnet94(4, width=4).eval()
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    maps = F.gelu(network.whitening((images - network.mean) / network.std))
    for group in network.groups:
        maps = group(maps)
    assert maps.shape[2:] == last
    torch.testing.assert_close(network.features(images), F.max_pool2d(maps, last).flatten(1))


def test_learns():
    recipe = dataclasses.replace(QUICK, epochs=24, width=16)
    assert train_victim(digits(0, 400), digits(400, 700), victim="convnet94", recipe=recipe).accuracy > 0.8


def test_goes_on_where_it_was_cut_off(train, test, tmp_path):
    """In the middle of the whitening's own epochs and of the steps between two averages."""
    recipe = dataclasses.replace(QUICK, epochs=5)
    whole = train_victim(train, test, victim="convnet94", recipe=recipe)

    def cut_off(entry):
        if entry["epoch"] == 2:
            raise KeyboardInterrupt

    options = {"victim": "convnet94", "recipe": recipe, "checkpoint_dir": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        train_victim(train, test, **options, progress=cut_off)
    rest = train_victim(train, test, **options)
    assert torch.equal(weights(rest.model), weights(whole.model))


def test_another_network_may_be_trained_so(train):
    images, labels = as_tensors(train)
    network = resnet18(10, in_channels=1, width=2)
    before = weights(network)
    train_model(network, images, labels, recipe=dataclasses.replace(QUICK, epochs=1))
    assert not torch.equal(weights(network), before)


def test_bad_input(train, test):
    small = [data.with_images(data.images[:, :8]) for data in (train, test)]
    with pytest.raises(ValueError, match="victim is 'convnet94'.* 8x16 .* 9 pixels"):
        train_victim(*small, victim="convnet94", recipe="smoke")
    with pytest.raises(ValueError, match="whitening has 100 images, .* 'resnet18'"):
        train_victim(train, test, whitening=test, recipe="smoke")
    colour = train.with_images(train.images.repeat(3, axis=3))
    with pytest.raises(ValueError, match="whitening has images of 3 channels, .* 1"):
        train_victim(train, test, victim="convnet94", whitening=colour, recipe="smoke")
    with pytest.raises(ValueError, match="width is 0, .* convnet94"):
        convnet94(10, width=0)
