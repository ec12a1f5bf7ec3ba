"""AdvCL: its loss, views, attack, batch normalisation and pseudo-labels; and Cutout and noise within views."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from jcdp_diffusers import countermeasures, victims
from jcdp_diffusers.countermeasures import Context, advcl
from jcdp_diffusers.countermeasures.advcl import AdvCL, AdvCLSettings
from jcdp_diffusers.trials import Trial
from jcdp_diffusers.victims import get_recipe, train_victim
from jcdp_diffusers.victims.contrastive import BYOL, MoCo, SimCLR, nt_xent
from jcdp_diffusers.victims.training import Hooks


SMALL = AdvCLSettings(steps=2, clusters=(2, 3))


@pytest.fixture
def images():
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def objective(quick_views):
    """SimCLR with AdvCL and pseudo-labels for six images."""
    torch.manual_seed(0)
    targets = torch.tensor([[0, 0], [1, 1], [0, 2], [1, 0], [0, 1], [1, 2]])
    network = victims.get("resnet18")(10, in_channels=3, width=4)
    return SimCLR(network, quick_views, (16, 16), Hooks([AdvCL(SMALL, targets)])), targets


def test_loss_of_four_views_is_the_mean_over_pairs_of_views_of_an_image():
    draw = torch.Generator().manual_seed(0)
    views = [torch.randn(5, 7, generator=draw) for _ in range(4)]
    unit = np.concatenate([view.double().numpy() for view in views])
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    losses = []
    for one in range(20):
        others = [row for row in range(20) if row != one]
        total = sum(np.exp(unit[one] @ unit[other] / 0.5) for other in others)
        partners = [other for other in others if other % 5 == one % 5]
        losses.append(np.mean([-np.log(np.exp(unit[one] @ unit[other] / 0.5) / total) for other in partners]))
    assert advcl.multi_view_loss(views, 0.5).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_loss_of_two_views_is_simclrs():
    views = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(advcl.multi_view_loss(list(views), 0.2), nt_xent(*views, 0.2))


@pytest.mark.parametrize("size", [(16, 16), (15, 20)])
def test_low_frequencies_are_cut_and_high_ones_stay(size):
    """Waves of k periods: none is left nearer than the radius, all is left beyond it."""
    height, width = size
    rows, columns = torch.arange(height)[:, None] / height, torch.arange(width) / width
    for down, across in ((0, 0), (1, 2), (3, 0), (2, 3), (0, 5), (4, 0), (4, 4)):
        wave = torch.cos(2 * torch.pi * (down * rows + across * columns)).expand(1, 3, -1, -1)
        stays = (down**2 + across**2) ** 0.5 >= 0.25 * height
        torch.testing.assert_close(advcl.high_frequencies(wave, 0.25), wave * stays, rtol=0, atol=1e-5)


def test_attack_reaches_the_closed_form_of_a_linear_loss(images, generator):
    weight = torch.randn(images.shape, generator=generator)
    moved = advcl.attack(lambda batch: (weight * batch).sum(), images, AdvCLSettings(steps=9), generator)
    torch.testing.assert_close(moved, (images + 8 / 255 * weight.sign()).clamp(0, 1))


def test_attacks_raise_the_loss_within_their_bound(objective, images, generator):
    network = objective[0].network.eval()

    def loss(batch):
        return -network.features(batch).square().sum()

    moved = advcl.attack(loss, images, AdvCLSettings(), generator)
    assert loss(moved) > loss(images)
    assert (moved - images).abs().max() <= 8 / 255 + 1e-6 and moved.min() >= 0 and moved.max() <= 1


def norms(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


def test_branches_stand_in_for_the_networks_own_batch_normalisation(objective, images):
    objective, _ = objective
    network, branches = objective.network, objective.of_hook
    own, names = norms(network), list(network.state_dict())
    assert len(own) == len(branches.norms["ordinary"]) == len(branches.norms["labelled"]) == 20
    before = [layer.running_mean.clone() for layer in own]
    network.train()
    with branches.instead(network, "ordinary"):
        assert norms(network) == list(branches.norms["ordinary"])
        network.features(images)
    assert norms(network) == own and list(network.state_dict()) == names
    assert all(torch.equal(layer.running_mean, mean) for layer, mean in zip(own, before, strict=True))
    assert all(layer.running_mean.any() for layer in branches.norms["ordinary"])
    assert not any(layer.running_mean.any() for layer in branches.norms["labelled"])
    with pytest.raises(RuntimeError), branches.instead(network, "labelled"):
        raise RuntimeError
    assert norms(network) == own


def test_each_kind_of_view_has_its_batch_normalisation_and_all_is_trained(objective, images, generator):
    objective, targets = objective
    objective.train()
    objective.loss(images, targets, generator).backward()
    network, branches = objective.network, objective.of_hook
    for layers in (norms(network), *branches.norms.values()):
        assert all(layer.weight.grad.any() and layer.running_mean.any() for layer in layers)
    assert all(head.weight.grad.any() for head in branches.heads) and objective.head[0].weight.grad.any()
    assert {id(parameter) for parameter in branches.parameters()} <= {id(one) for one in objective.parameters()}


def test_loss_is_that_of_four_views_and_a_fifth_of_the_error_on_pseudo_labels(objective, images, monkeypatch):
    """With an attack that does nothing, from the parts."""
    objective, targets = objective
    objective.eval()
    monkeypatch.setattr(advcl, "attack", lambda loss, images, settings, generator: images)
    monkeypatch.setattr(advcl, "random_crop_flip", lambda images, generator, **options: images)
    monkeypatch.setattr(objective, "view", lambda images, generator: images.flip(-1))
    loss = objective.loss(images, targets, torch.Generator())
    high = advcl.high_frequencies(images, 0.25)
    projections = [
        objective.head(objective.network.features(views)) for views in (images, images.flip(-1), images.flip(-1), high)
    ]
    features = objective.network.features(images)
    errors = [nn.CrossEntropyLoss()(head(features), one) for head, one in zip(objective.of_hook.heads, targets.T)]
    wanted = 0.5 / 0.07 * advcl.multi_view_loss(projections, 0.5) + 0.2 * sum(errors) / 2
    torch.testing.assert_close(loss, wanted)


def test_loss_is_multiplied_as_in_the_program_under_every_recipe():
    """SimCLR's own recipes have that factor too, but for `cp`, which has it divided by its program's processes."""
    factors = {name: get_recipe(name, "simclr").loss_factor for name in ("cp", "fast", "mini", "digits", "smoke")}
    own = factors.pop("cp")
    wanted = get_recipe("cp", "simclr").temperature / advcl.BASE_TEMPERATURE
    assert set(factors.values()) == {wanted} == {4 * own}


def test_pseudo_labels_are_clusters_of_what_the_collected_images_taught(train, collected, tmp_path):
    context = Context(collected=collected, checkpoint_dir=tmp_path)
    settings = dataclasses.replace(advcl.SETTINGS["advcl"], clusters=(2, 5))
    targets, seconds_before = advcl.pseudo_labels(train, settings, context)
    assert seconds_before == 0
    assert targets.shape == (160, 2) and targets.dtype == torch.int64
    assert [len(one.unique()) for one in targets.T] == [2, 5]
    again, seconds_before = advcl.pseudo_labels(train, settings, context)  # from what is kept
    assert torch.equal(again, targets) and seconds_before > 0
    without = dataclasses.replace(train, labels=None, class_names=None)
    assert torch.equal(advcl.pseudo_labels(without, settings, Context(collected=collected))[0], targets)
    other = collected.with_images(255 - collected.images)
    assert not torch.equal(
        advcl.pseudo_labels(train, settings, Context(collected=other, checkpoint_dir=tmp_path))[0], targets
    )
    with pytest.raises(ValueError, match="data has 4 images.*5.*advcl-plain"):
        advcl.pseudo_labels(train.subset(range(4)), settings, context)


def test_every_seed_counts_the_training_of_the_network_for_pseudo_labels(train, collected, tmp_path, monkeypatch):
    monkeypatch.setattr(advcl, "kept_seconds", lambda folder: 1000.0)
    prepared = countermeasures.get("advcl").prepare(train, collected=collected, checkpoint_dir=tmp_path)
    assert 1000 < prepared.seconds < 1100


def test_a_smoke_run_takes_few_clusters_and_a_short_recipe(train):
    few, whole = (countermeasures.get("gray+advcl", smoke=smoke) for smoke in (True, False))
    assert max(few.settings["advcl"]["clusters"]) <= 10 and get_recipe(few.settings["advcl"]["recipe"], "simclr").smoke
    assert few.settings["advcl"]["epsilon"] == whole.settings["advcl"]["epsilon"]
    few.require_images(train.subset(range(10)))
    assert few.needs_collected and not countermeasures.get("advcl-plain", smoke=True).needs_collected


def test_published_numbers_are_the_programs():
    settings = AdvCLSettings()
    assert (settings.epsilon, settings.step_size, settings.steps) == (8 / 255, 2 / 255, 5)
    assert 32 * settings.radius == 8 and 32 * settings.crop_padding == 4 and settings.label_weight == 0.2
    assert settings.clusters == (2, 10, 50, 100, 500)


class Stopped(Exception):
    """Stands for a kill after an epoch."""


def test_training_that_was_cut_off_ends_as_if_it_had_not_been(train, test, collected, quick_views, tmp_path):
    prepared = countermeasures.get("advcl").prepare(train, collected=collected)
    options = {"method": "simclr", "probe": test, "recipe": quick_views, "hooks": prepared.hooks}
    whole = train_victim(prepared.data, test, **options).model.state_dict()

    def stop(entry):
        raise Stopped

    with pytest.raises(Stopped):
        train_victim(prepared.data, test, **options, checkpoint_dir=tmp_path, progress=stop)
    resumed = train_victim(prepared.data, test, **options, checkpoint_dir=tmp_path).model.state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.parametrize("method, kind", [("moco-v2", MoCo), ("byol", BYOL)])
def test_other_ways_without_labels_are_refused(method, kind):
    with pytest.raises(ValueError, match=f"countermeasure is 'advcl'.*'{method}'.*gray"):
        countermeasures.get("advcl").require_learning(method)
    network = victims.get("resnet18")(10, in_channels=3, width=2)
    with pytest.raises(ValueError, match=f"method is '{method}'.*'simclr'"):
        kind(network, get_recipe("smoke", method), (16, 16), Hooks([AdvCL(SMALL)]))


def test_collected_images_that_are_missing_or_too_few(train, test, collected, quick_views):
    with pytest.raises(ValueError, match="collected is None.*'advcl'"):
        countermeasures.get("advcl").prepare(train)
    options = {"method": "simclr", "probe": test, "countermeasure": "gray+advcl"}
    with pytest.raises(ValueError, match="collected is None.*'gray\\+advcl'"):
        Trial(train, test, quick_views, 0, **options)
    with pytest.raises(ValueError, match="collected has 100 images.*'gray\\+advcl' needs at least 128"):
        Trial(train, test, quick_views, 0, **options, collected=test)
    trial = Trial(train, test, quick_views, 0, **options, collected=collected)
    assert trial.settings["collected_images"]["images"] == len(collected)
    assert trial.name != Trial(train, test, quick_views, 0, **options, collected=train).name
    with pytest.raises(ValueError, match="advcl and at-8 each do"):
        countermeasures.get("advcl+at-8")


def test_other_hooks_change_all_four_views(photos, quick_views, monkeypatch):
    """With Cutout, each view that AdvCL compares has a black square."""
    hooks = countermeasures.get("advcl-plain+cutout").prepare(photos).hooks
    objective = SimCLR(victims.get("resnet18")(4, width=2), quick_views, (32, 32), Hooks(hooks))
    seen, project = [], advcl.project
    monkeypatch.setattr(advcl, "project", lambda objective, views: seen.append(views) or project(objective, views))
    monkeypatch.setattr(advcl, "attack", lambda loss, images, settings, generator: images)
    monkeypatch.setattr(advcl, "high_frequencies", lambda images, radius: images)
    monkeypatch.setattr(advcl, "random_crop_flip", lambda images, generator, **options: images)
    objective.loss(torch.full((4, 3, 32, 32), 0.5), None, torch.Generator().manual_seed(0))
    assert len(seen) == 4
    for views in seen:
        black = (views == 0).all(dim=1).float().mean(dim=(1, 2))
        assert (black > 0.05).all()


def views_with(name, data, images, recipe):
    hooks = countermeasures.get(name).prepare(data).hooks
    objective = SimCLR(victims.get("resnet18")(10, width=2), recipe, (16, 16), Hooks(hooks))
    seen = []
    objective.between = lambda first, second: seen.extend((first, second)) or first.sum()
    objective.loss(images, None, torch.Generator().manual_seed(0))
    plain = SimCLR(objective.network, recipe, (16, 16))
    draw = torch.Generator().manual_seed(0)
    return seen, [plain.view(images, draw) for _ in range(2)]


def test_cutout_is_within_each_view(photos, images, quick_views):
    """A square of each view is black, elsewhere in the two views of an image; the rest is the plain view."""
    views, plain = views_with("cutout", photos, images, quick_views)
    places = []
    for view, other in zip(views, plain, strict=True):
        cut = (view != other).any(dim=1)
        assert (view[cut[:, None].expand_as(view)] == 0).all()
        rows, columns = cut.any(dim=2), cut.any(dim=1)
        assert torch.equal(cut, rows[:, :, None] & columns[:, None, :])  # one rectangle
        assert ((1 <= rows.sum(dim=1)) & (rows.sum(dim=1) <= 8)).all() and (columns.sum(dim=1) <= 8).all()
        places.append(cut)
    assert (places[0] != places[1]).any(dim=2).any(dim=1).all()


def test_random_noise_is_within_each_view(photos, images, quick_views):
    views, plain = views_with("random-noise", photos, images, quick_views)
    noise = [view - other for view, other in zip(views, plain, strict=True)]
    for one in noise:
        assert 7 / 255 < one.abs().max() <= 8 / 255 + 1e-6
    assert (noise[0] != noise[1]).float().mean() > 0.5
