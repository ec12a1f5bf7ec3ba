"""UC and UC-CLIP: clusters, the generator of one cluster's noise, and what becomes of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from interrupts import cut_off_at_save
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models import squeezenet1_0

from jcdp_diffusers import poisons
from jcdp_diffusers.devices import seeded
from jcdp_diffusers.poisons import uc
from jcdp_diffusers.poisons.checkpoint import Checkpoint
from jcdp_diffusers.poisons.uc import UCSettings


CPU = torch.device("cpu")
SMOKE = poisons.settings("uc", "smoke")


class Colours(nn.Module):
    """Features: the mean of each colour, times 60."""

    def forward(self, images):
        return 60 * images.mean(dim=(2, 3))


def test_divergence_is_the_sum_over_features_averaged_over_images():
    draw = torch.Generator().manual_seed(0)
    features, target = torch.randn(5, 7, generator=draw), torch.randn(7, generator=draw)
    wanted = np.exp(target.double().numpy())
    wanted /= wanted.sum()
    total = 0.0
    for row in features.double().numpy():
        seen = np.exp(row) / np.exp(row).sum()
        total += sum(p * (np.log(p) - np.log(q)) for p, q in zip(wanted, seen, strict=True))
    assert uc.divergence(features, target).item() == pytest.approx(total / 5, rel=1e-5)
    assert uc.divergence(target.expand(3, -1), target).item() == pytest.approx(0, abs=1e-6)


def test_clusters_are_those_of_the_features_and_centres_their_means():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(60, 4, generator=draw) + 50 * (torch.arange(60) % 3)[:, None]
    members, centres = uc.find_clusters(features, replace(SMOKE, kmeans_starts=3), seed=0)
    for number in range(3):
        assert len(members[number::3].unique()) == 1
        torch.testing.assert_close(centres[members[number]], features[number::3].mean(dim=0), rtol=1e-4, atol=1e-4)
    assert len(members.unique()) == 3


def test_noise_reaches_the_best_there_is_for_a_network_of_colours(images):
    """Features are mean colours, so the best noise that leads to red is red, at any pixel of any image."""
    settings = UCSettings(
        batch_size=40, learning_rate=3e-3, generator_width=8, generator_blocks=1, noise_on="images",
        enlarged_size=16, view_size=16,
    )  # fmt: skip
    training = uc.PatternTraining(0, (3, 16, 16), settings, 60, 0, CPU)
    target = torch.tensor([60.0, 0.0, 0.0])
    for step in range(60):
        training.step(step, Colours(), images, target)
    best = torch.tensor([16.0, -16.0, -16.0]).view(3, 1, 1) / 255
    losses = [
        uc.divergence(Colours()((images + noise).clamp(0, 1)), target) for noise in (0, training.pattern(), best)
    ]
    assert (losses[0] - losses[1]) / (losses[0] - losses[2]) > 0.9
    assert training.pattern().abs().max() <= 16 / 255


def test_every_image_gets_the_noise_of_its_cluster_and_the_target_is_the_next(images, monkeypatch):
    targets = []

    class Fixed(uc.PatternTraining):
        def step(self, number, network, images, target, scale):
            targets.append(target)
            return 0.0

        def pattern(self):
            return torch.full((1, 3, 16, 16), self.seeds[1] / 255)

    members, centres = torch.arange(40) % 3, torch.arange(6.0).reshape(3, 2)
    monkeypatch.setattr(uc, "PatternTraining", Fixed)
    monkeypatch.setattr(uc, "find_clusters", lambda *others: (members, centres))
    perturbation = poisons.get("uc")(images, preset="smoke")
    assert torch.equal(255 * perturbation, members.float().view(-1, 1, 1, 1).expand_as(images))
    assert [target.tolist() for target in targets[::2]] == [[2, 3], [4, 5], [0, 1]] and len(targets) == 6


def test_features_are_scaled_to_a_standard_deviation(images, monkeypatch):
    """Features eight times as large give the same noise, once they are scaled; without that they do not."""

    class Louder(uc.pretrained.Pretrained):
        def forward(self, images):
            return 8 * super().forward(images)

    made = {}
    for std in (None, 0.5):
        settings = replace(SMOKE, feature_std=std, learning_rate=0.01)
        for kind in (uc.pretrained.Pretrained, Louder):
            with monkeypatch.context() as patch:
                patch.setattr(uc.pretrained, "Pretrained", kind)
                made[std, kind] = poisons.get("uc")(images, preset=settings)
    assert torch.equal(made[0.5, Louder], made[0.5, uc.pretrained.Pretrained])
    assert not torch.equal(made[None, Louder], made[None, uc.pretrained.Pretrained])


def test_noise_is_added_before_images_are_enlarged_or_to_the_views(images):
    training = {
        place: uc.PatternTraining(0, (3, 16, 16), replace(SMOKE, noise_on=place, view_size=16), 2, 0, CPU)
        for place in uc.NOISE_ON
    }
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8).expand(1, 3, 16, 16) * 16 / 255
    seen = {}
    for place, one in training.items():
        one.cut = lambda batch: batch[:, :, 10:26, 10:26]
        seen[place] = one.views(images[:4], checks)
    enlarged = F.interpolate(images[:4], (36, 36), mode="bilinear", antialias=True)[:, :, 10:26, 10:26]
    torch.testing.assert_close(seen["views"], (enlarged + checks).clamp(0, 1))
    changed = F.interpolate((images[:4] + checks).clamp(0, 1), (36, 36), mode="bilinear", antialias=True)
    torch.testing.assert_close(seen["images"], changed[:, :, 10:26, 10:26])


def test_noise_of_views_becomes_that_of_larger_images_by_nearest_pixels():
    draw = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 40, 48, generator=draw)
    settings = replace(SMOKE, noise_on="views", clusters=2, enlarged_size=32)
    perturbation = poisons.get("uc")(images, preset=settings)
    rows, columns = torch.arange(40) * 32 // 40, torch.arange(48) * 32 // 48
    small = perturbation[0][:, rows.diff(prepend=torch.tensor([-1])) > 0][
        :, :, columns.diff(prepend=torch.tensor([-1])) > 0
    ]
    assert small.shape == (3, 32, 32)
    assert torch.equal(small[:, rows][:, :, columns], perturbation[0])


def test_generator_is_the_network_of_the_program():
    """Weights counted layer by layer, and any size of 8 pixels and more."""
    width, blocks = 64, 6
    convolutions = 3 * 64 * 49 + 64 * 128 * 9 + 128 * 256 * 9 + blocks * 2 * 256 * 256 * 9
    convolutions += 256 * 128 * 9 + 128 * 64 * 9 + 64 * 3 * 49 + 3
    norms = 2 * (64 + 128 + 256 + blocks * 2 * 256 + 128 + 64)
    generator = uc.Generator(3, width, blocks)
    assert sum(parameter.numel() for parameter in generator.parameters()) == convolutions + norms
    small = uc.Generator(1, 4, 1)
    for size in ((8, 8), (9, 11), (30, 17)):
        made = small(torch.rand(1, 1, *size))
        assert made.shape == (1, 1, *size) and made.abs().max() <= 1


def test_noise_is_that_of_the_generator_in_training_mode(images):
    training = uc.PatternTraining(0, (3, 16, 16), SMOKE, 2, 0, CPU)
    training.step(0, Colours(), images, torch.zeros(3))
    pattern = training.pattern()
    assert torch.equal(pattern, training.pattern())
    training.generator.eval()
    assert not torch.allclose(pattern, training.pattern(), atol=1e-3)


def test_a_pass_has_every_image_once_in_an_order_of_its_own():
    training = uc.PatternTraining(0, (3, 8, 8), replace(SMOKE, batch_size=16), 6, 0, CPU)
    passes = [[training.rows(step, 40) for step in range(first, first + 3)] for first in (0, 3)]
    assert [len(rows) for rows in passes[0]] == [16, 16, 8]
    first, second = (torch.cat(one) for one in passes)
    assert torch.equal(first.sort().values, torch.arange(40)) and torch.equal(second.sort().values, torch.arange(40))
    assert not torch.equal(first, second)


def test_published_numbers_are_the_programs():
    for name, surrogate in (("uc", "resnet50"), ("uc-clip", "clip")):
        settings = poisons.settings(name)
        assert (settings.epsilon, settings.clusters, settings.offset, settings.epochs) == (16, 10, 1, 50)
        assert (settings.batch_size, settings.learning_rate, settings.last_learning_rate) == (256, 1e-4, 1e-6)
        assert (settings.enlarged_size, settings.view_size, settings.noise_on) == (256, 224, "views")
        assert settings.surrogate == surrogate and settings.weights is None and settings.kmeans_starts == 10
    assert poisons.settings("uc-clip", "rn50").surrogate == "open-clip-rn50"
    # 3,680 images of the Pets: 15 batches.
    assert uc.steps_per_cluster(3680, UCSettings()) == 750
    assert uc.steps_per_cluster(3680, UCSettings(max_steps=100)) == 100


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("uc", {"noise_on": "views"}, "images are 16x16, but must be at least 32x32 .*'any-size'"),
        ("uc", {"noise_on": "pixels"}, "noise_on is 'pixels'.*views, images"),
        ("uc", {"clusters": 41}, "images holds 40.*41 clusters"),
        ("uc", {"clusters": 1}, "clusters is 1, .* at least 2"),
        ("uc", {"offset": 3}, "offset is 3, .* multiple of clusters 3"),
        ("uc", {"max_steps": 0}, "max_steps is 0, .* at least 1"),
        ("uc", {"batch_size": 0}, "batch_size is 0, .* at least 1"),
        ("uc", {"learning_rate": -1.0}, "learning_rate is -1.0, .* above 0"),
        ("uc", {"feature_std": 0.0}, "feature_std is 0.0, .* above 0"),
        ("uc", {"enlarged_size": 20}, "enlarged_size is 20.*view_size 32"),
        ("uc", {"view_size": 16}, "view_size is 16.*21 pixels"),
        ("uc", {"surrogate": "alexnet"}, "surrogate is 'alexnet'.*resnet50, squeezenet1_0"),
        ("uc-clip", {"view_size": 16}, "view_size is 16, but must be 32"),
        ("uc-clip", {"weights": None}, "weights is None.*'random'"),
    ],
)  # fmt: skip
def test_settings_that_do_not_suit_are_refused(name, changes, said, images):
    with pytest.raises(ValueError, match=said):
        poisons.get(name)(images, preset=replace(poisons.settings(name, "smoke"), **changes))


def test_noise_does_not_go_on_with_other_weights(images, tmp_path):
    """The file's content decides, and not its name."""

    def weights(seed, path):
        with seeded(seed):
            save_file(squeezenet1_0().state_dict(), path)
        return replace(poisons.settings("uc", "smoke"), weights=str(path))

    first, moved = weights(1, tmp_path / "first.safetensors"), weights(1, tmp_path / "moved.safetensors")
    with cut_off_at_save(Checkpoint, 2):
        poisons.get("uc")(images, preset=first, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="holds another run"):
        poisons.get("uc")(images, preset=weights(2, tmp_path / "first.safetensors"), checkpoint_dir=tmp_path)
    noise = poisons.get("uc")(images, preset=moved, checkpoint_dir=tmp_path)
    assert torch.equal(noise, poisons.get("uc")(images, preset=moved))


def test_a_generator_that_does_not_converge_gives_no_noise(images):
    with pytest.raises(FloatingPointError, match="surrogate's loss became nan"):
        poisons.get("uc")(images, preset=replace(poisons.settings("uc", "smoke"), learning_rate=1e30))


def test_images_that_are_all_alike_are_refused():
    with pytest.raises(ValueError, match="images have surrogate features that are all alike"):
        poisons.get("uc")(torch.full((20, 3, 16, 16), 0.5), preset="smoke")
    with pytest.raises(ValueError, match="images have surrogate features that are all alike"):
        uc.scale_of(torch.ones(5, 4), 0.5)
    assert (
        uc.scale_of(torch.tensor([[1.0, -1.0]]), 2**0.5) == pytest.approx(1)
        and uc.scale_of(torch.ones(2, 2), None) == 1
    )


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="images are 7x9.*8x8"):
        poisons.get("uc")(torch.rand(20, 3, 7, 9), preset="smoke")
