"""What every poison must be, whatever its method: parametrised over the registry, so that a new one is tested by being in it."""

from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from jcdp_diffusers import poisons
from jcdp_diffusers.data.perturbations import apply_perturbation, measured_norms
from jcdp_diffusers.poisons.control import shuffled


def make(name, images, labels, seed=0):
    return poisons.get(name)(images, labels, seed=seed, preset="smoke")


@pytest.fixture(scope="module", params=poisons.NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def perturbation(name, data):
    return make(name, data.tensor(), torch.from_numpy(data.labels))


def test_changes_every_image(perturbation, data):
    assert perturbation.shape == data.tensor().shape and perturbation.dtype == torch.float32
    poisoned = apply_perturbation(data.images, perturbation)
    assert (poisoned != data.images).any(axis=(1, 2, 3)).all()


def test_keeps_its_budget_after_rounding(name, perturbation, data):
    poisoned = apply_perturbation(data.images, perturbation)
    measured = measured_norms(data.images, poisoned)
    promised = poisons.budget(name, "smoke", tuple(perturbation.shape[1:]))
    assert measured["linf"] <= promised.get("linf", 255)
    # Rounding moves a value by half a level at most.
    assert measured["l2_max"] <= promised.get("l2", np.inf) + 0.5 / 255 * np.sqrt(perturbation[0].numel())
    assert measured["l0_max"] <= promised.get("l0", np.inf)


def test_comes_close_to_its_budget(name, perturbation):
    promised = poisons.budget(name, "smoke", tuple(perturbation.shape[1:]))
    if "l2" in promised:
        norms = perturbation.flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.full_like(norms, promised["l2"]))
    if "linf" in promised:
        assert 255 * perturbation.abs().max() > 0.4 * promised["linf"]


def test_is_a_function_of_the_seed(name, perturbation, images, labels):
    assert torch.equal(make(name, images, labels), perturbation)
    if name != "ops":  # a search without chance
        assert not torch.equal(make(name, images, labels, seed=1), perturbation)


def test_depends_on_the_labels(name, perturbation, images, labels):
    other = make(name, images, torch.arange(len(labels)) // 10)
    assert (other != perturbation).flatten(1).any(dim=1).float().mean() > 0.5


def test_leaves_its_arguments_and_global_randomness_alone(name, images, labels):
    before = images.clone(), labels.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    make(name, images, labels)
    after = images, labels, torch.get_rng_state(), np.random.get_state()[1]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_works_on_small_grey_images(name, grey):
    perturbation = make(name, grey.tensor(), torch.from_numpy(grey.labels))
    assert perturbation.shape == (40, 1, 8, 8) and perturbation.isfinite().all() and perturbation.any()


def test_documents_its_source_and_every_number(name):
    module = poisons.method(name)
    assert module.SOURCE and module.__doc__
    assert {"published", "cpu", "smoke"} <= set(module.PRESETS)
    for settings in module.PRESETS.values():
        assert is_dataclass(settings) and settings.__dataclass_params__.frozen
        assert all(field.name in type(settings).__doc__ for field in fields(settings))


def test_unknown_names_are_refused(images, labels):
    with pytest.raises(ValueError, match="method is 'noise', but the poisons are lsp, emn, emn-class, remn, tap"):
        poisons.get("noise")
    with pytest.raises(ValueError, match="preset is 'big', but lsp has published, stated, cpu, smoke"):
        poisons.get("lsp")(images, labels, preset="big")


def test_settings_may_be_given_as_an_object():
    settings = poisons.settings("lsp", "stated")
    assert poisons.settings("lsp", settings) is settings


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda x, y: (x[0], y), r"images has shape \(3, 16, 16\), but \(N, 1 or 3, H, W\)"),
        (lambda x, y: (255 * x, y), r"images holds torch.float32 in \[.*\], but floats in \[0, 1\] are needed"),
        (lambda x, y: ((255 * x).byte(), y), "images holds torch.uint8"),
        (lambda x, y: (x, y[:5]), r"labels has shape \(5,\), but 40 images need as many labels"),
        (lambda x, y: (x, y - 1), "labels holds torch.int64 from -1 on, but int64 from 0 on is needed"),
        (lambda x, y: (x, y.float()), "labels holds torch.float32"),
    ],
)
def test_wrong_input_is_refused(images, labels, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        poisons.get("lsp")(*change(images, labels))


def test_perturbation_is_added_clipped_and_rounded_once():
    images = np.array([0, 3, 250, 100], dtype=np.uint8).reshape(1, 2, 2, 1)
    perturbation = torch.tensor([-8.0, -8.0, 8.0, 7.6]).reshape(1, 1, 2, 2) / 255
    poisoned = apply_perturbation(images, perturbation)
    assert poisoned.dtype == np.uint8 and poisoned.ravel().tolist() == [0, 0, 255, 108]


def test_perturbation_must_fit_the_images(data):
    with pytest.raises(ValueError, match=r"perturbation has shape \(40, 16, 16, 3\), but the images need \(40, 3, 16"):
        apply_perturbation(data.images, np.zeros((40, 16, 16, 3)))
    with pytest.raises(ValueError, match="images has dtype float64, but uint8 is needed"):
        apply_perturbation(data.images / 255, np.zeros((40, 3, 16, 16)))


def test_norms_are_those_of_the_bytes():
    clean = np.zeros((2, 2, 2, 3), dtype=np.uint8)
    poisoned = clean.copy()
    poisoned[0, 0, 0] = [3, 4, 0]
    poisoned[1, 0] = 255
    norms = measured_norms(clean, poisoned)
    assert norms["linf"] == 255 and norms["l0_max"] == 2 and norms["l0_mean"] == 1.5
    assert norms["l2_max"] == pytest.approx(np.sqrt(6))
    assert norms["l2_mean"] == pytest.approx((5 / 255 + np.sqrt(6)) / 2)
    with pytest.raises(ValueError, match=r"poisoned has shape \(1, 2, 2, 3\), but the clean images have"):
        measured_norms(clean, poisoned[:1])


def test_control_has_the_norms_of_the_poison_and_nothing_else(perturbation):
    control = shuffled(perturbation, seed=0)
    assert control.shape == perturbation.shape
    # The same sizes in every channel, elsewhere, and in another image.
    pixels, others = (noise.abs().flatten(2).sort(dim=2).values.flatten(1) for noise in (perturbation, control))
    assert torch.equal(torch.unique(pixels, dim=0), torch.unique(others, dim=0))
    changed, unchanged = (noise.flatten(2).ne(0).any(dim=1).sum(dim=1) for noise in (perturbation, control))
    assert torch.equal(changed.sort().values, unchanged.sort().values)
    assert not torch.equal(control, perturbation)
    assert torch.equal(control, shuffled(perturbation, seed=0))


def test_control_does_not_know_an_images_class():
    """Sizes of a class of their own, as AR's noise has, must not stay with the class."""
    labels = torch.arange(2000) % 2
    noise = torch.randn(2000, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * (1 + labels.view(-1, 1, 1, 1))
    sizes = shuffled(noise, seed=0).flatten(1).norm(dim=1)
    of_zero, of_one = sizes[labels == 0], sizes[labels == 1]
    assert abs(of_zero.mean() - of_one.mean()) < 4 * sizes.std() * (2 / 1000) ** 0.5


NINTH = '''
"""Stripes: every class gets horizontal stripes of its own width."""

from dataclasses import dataclass

import torch


SOURCE = "an example"


@dataclass(frozen=True)
class StripesSettings:
    """Numbers of stripes: `epsilon`, their height in 1/255."""

    epsilon: float = 8.0


PRESETS = {"published": StripesSettings(), "cpu": StripesSettings(), "smoke": StripesSettings()}


def budget(settings, shape):
    return {"linf": settings.epsilon}


def perturb(images, labels, settings, *, seed, device, checkpoint_dir, progress):
    rows = torch.arange(images.shape[2]) // (labels[:, None] + 1) % 2
    return settings.epsilon / 255 * (2.0 * rows - 1)[:, None, :, None].expand_as(images).contiguous()
'''


def test_a_ninth_poison_is_one_file_and_one_line(data, tmp_path, monkeypatch):
    (tmp_path / "stripes.py").write_text(NINTH)
    monkeypatch.setattr(poisons, "__path__", [*poisons.__path__, str(tmp_path)])
    monkeypatch.setitem(poisons._FILES, "stripes", "stripes")

    perturbation = poisons.get("stripes")(data.tensor(), torch.from_numpy(data.labels))
    poisoned = apply_perturbation(data.images, perturbation)
    assert measured_norms(data.images, poisoned)["linf"] == 8
    assert poisons.budget("stripes", "smoke", (3, 16, 16)) == {"linf": 8.0}
