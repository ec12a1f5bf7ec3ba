"""What every poison must be, whatever its method: parametrised over the registry, so that a new one is tested by being in it."""

import importlib
import json
import pkgutil
import re
from dataclasses import asdict, dataclass, fields, is_dataclass, replace

import datasets
import numpy as np
import pytest
import torch
import yaml

from jcdp_diffusers import poisons
from jcdp_diffusers.data.perturbations import apply_perturbation, measured_norms
from jcdp_diffusers.poisons import Poison, control, protect


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


def test_depends_on_the_seed_as_declared_and_leaves_everything_else_alone(name, perturbation, images, labels):
    before = images.clone(), labels.clone(), torch.get_rng_state(), np.random.get_state()[1].copy()
    other = make(name, images, labels, seed=1)
    after = images, labels, torch.get_rng_state(), np.random.get_state()[1]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(other, perturbation) != poisons.get(name).uses_seed


def test_depends_on_the_labels_as_declared(name, perturbation, images, labels):
    other = make(name, images, torch.arange(len(labels)) // 10)
    if poisons.get(name).uses_labels:
        assert (other != perturbation).flatten(1).any(dim=1).float().mean() > 0.5
        with pytest.raises(ValueError, match=f"labels is None.*{name}"):
            make(name, images, None)
    else:
        assert torch.equal(other, perturbation) and torch.equal(make(name, images, None), perturbation)


def test_classes_without_images_change_nothing(name, perturbation, data):
    """Labels with gaps: a network has no output, and no image a target, that stands for none of the images."""
    assert torch.equal(make(name, data.tensor(), 3 * torch.from_numpy(data.labels) + 1), perturbation)


def test_works_on_small_grey_images(name, grey):
    perturbation = make(name, grey.tensor(), torch.from_numpy(grey.labels))
    assert perturbation.shape == (40, 1, 8, 8) and perturbation.isfinite().all() and perturbation.any()


def test_documents_its_source_and_every_number(name):
    poison = poisons.get(name)
    assert poison.name == name and poison.title and poison.source
    assert importlib.import_module(poison.perturb.__module__).__doc__
    assert {"published", "cpu", "smoke"} <= set(poison.presets)
    for settings in poison.presets.values():
        assert is_dataclass(settings) and settings.__dataclass_params__.frozen
        described = "".join(kind.__doc__ for kind in type(settings).__mro__ if is_dataclass(kind))
        assert all(re.search(rf"\b{field.name}\b", described) for field in fields(settings))


def test_noise_is_made_again_and_stays_with_its_image_through_shuffles_and_filters(
    name, perturbation, data, tmp_path, monkeypatch
):
    """
    Poison, write, read, shuffle and filter by ids and labels, join with the clean images: the difference is the noise.

    It is that of the same seed, bit for bit, and the method keeps its state where it declares a network.
    """
    expected = dict(zip(data.ids, apply_perturbation(data.images, perturbation), strict=True))
    call, made = Poison.__call__, []

    def watched(self, *images_and_labels, checkpoint_dir, **options):
        made.append(call(self, *images_and_labels, checkpoint_dir=checkpoint_dir, **options))
        kept = checkpoint_dir.is_dir() and any(checkpoint_dir.iterdir())
        assert kept == (self.surrogate is not None)
        return made[-1]

    monkeypatch.setattr(Poison, "__call__", watched)
    protect.protect_dataset(data, tmp_path, method=name, preset="smoke")
    assert len(made) == 1 and torch.equal(made[0], perturbation)
    assert poisons.get(name).surrogate in (None, "supervised", "contrastive", "pretrained")

    rows = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    rows = rows.shuffle(seed=3).filter(lambda row: row["label"] != 1)
    assert len(rows) == 30 and rows["id"] != sorted(rows["id"])
    label_of = dict(zip(data.ids, data.labels.tolist(), strict=True))
    for row in rows:
        np.testing.assert_array_equal(np.asarray(row["image"]), expected[row["id"]])
        assert row["label"] == label_of[row["id"]]


def test_every_poison_of_every_file_is_registered_and_titles_differ():
    families = [entry.name for entry in pkgutil.iter_modules(poisons.__path__)]
    modules = [importlib.import_module(f"jcdp_diffusers.poisons.{name}") for name in families]
    offered = [poison for module in modules for poison in getattr(module, "POISONS", ())]
    assert sorted(poison.name for poison in offered) == sorted(poisons.NAMES)
    assert len({poison.title for poison in offered}) == len(offered)


def test_unknown_names_are_refused(images, labels):
    with pytest.raises(ValueError, match="method is 'noise'.*emn, emn-class, remn, lsp, tap"):
        poisons.get("noise")
    with pytest.raises(ValueError, match="preset is 'big'.*published, stated, cpu, smoke"):
        poisons.get("lsp")(images, labels, preset="big")


def test_settings_may_be_given_as_an_object():
    settings = poisons.settings("lsp", "stated")
    assert poisons.settings("lsp", settings) is settings
    with pytest.raises(ValueError, match="preset is LSPSettings.*emn"):
        poisons.settings("emn", settings)
    # Of a subclass either: its settings are those of another method.
    with pytest.raises(ValueError, match="preset is EMNClassSettings.*emn"):
        poisons.settings("emn", poisons.settings("emn-class"))


def test_settings_survive_a_card(name):
    for settings in poisons.get(name).presets.values():
        written = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
        assert poisons.settings_of_card(name, written) == settings


def test_both_stages_of_cp_follow_a_change_of_what_they_share():
    poison = poisons.get("cp-s")
    changed = poison.changed("cpu", {"epsilon": 4.0, "batch_size": 32, "surrogate": "vit", "rounds": 7})
    for stage in (changed, changed.start):
        assert (stage.epsilon, stage.batch_size, stage.surrogate) == (4.0, 32, "vit")
    before = poison.settings("cpu")
    assert changed.rounds == 7 and changed.start.rounds == before.start.rounds and before.start.epsilon == 8.0


def test_numbers_of_a_preset_may_be_replaced():
    poison = poisons.get("uc")
    changed = poison.changed("smoke", {"epsilon": 8, "weights": None, "surrogate": "resnet50"})
    assert (changed.epsilon, changed.weights, changed.surrogate, changed.clusters) == (8, None, "resnet50", 3)
    assert poison.changed("smoke", {}) == "smoke"
    with pytest.raises(ValueError, match="--set has 'eps'.*uc: epsilon, clusters"):
        poison.changed("smoke", {"eps": 8}, name="--set")
    with pytest.raises(ValueError, match="settings has clusters 2.5.*int"):
        poison.changed("smoke", {"clusters": 2.5})
    with pytest.raises(ValueError, match="settings has weights 3.*str"):
        poison.changed("smoke", {"weights": 3})


def test_numbers_within_a_field_may_be_replaced():
    changed = poisons.get("dune").changed("smoke", {"recipe.epochs": 3, "offset": 1})
    assert (changed.recipe.epochs, changed.recipe.batch_size, changed.offset) == (3, 32, 1)
    with pytest.raises(ValueError, match="settings has recipe.epochs 'many'.*int"):
        poisons.get("dune").changed("smoke", {"recipe.epochs": "many"})
    with pytest.raises(ValueError, match="settings has 'recipe.drop'.*recipe.epochs"):
        poisons.get("dune").changed("smoke", {"recipe.drop": True})


@pytest.mark.parametrize("name", [*("emn", "emn-class", "remn", "tap", "sem", "pil", "aue", "aap", "dune", "tue")])
def test_one_class_is_refused_where_classes_are_told_apart(name, images, labels):
    assert poisons.get(name).least_classes == 2
    with pytest.raises(ValueError, match=f"labels holds 1 class, but must hold at least 2 for {name}"):
        poisons.get(name)(images, torch.ones_like(labels), preset="smoke")


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda x, y: (x[0], y), r"images has shape \(3, 16, 16\)"),
        (lambda x, y: (255 * x, y), r"images holds torch.float32 in \[.*255\]"),
        (lambda x, y: ((255 * x).byte(), y), "images holds torch.uint8"),
        (lambda x, y: (x / 0, y), "images holds torch.float32"),
        (lambda x, y: (x, y[:5]), r"labels has shape \(5,\).*40"),
        (lambda x, y: (x, y - 1), "labels holds torch.int64 from -1"),
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


@pytest.mark.parametrize("name", ["emn", "cp-c", "uc"])
def test_numbers_that_are_no_bound_are_refused(name, images, labels):
    poison = poisons.get(name)
    for epsilon in (0.0, -3.0, 256.0):
        with pytest.raises(ValueError, match=f"epsilon is {epsilon}, but must be above 0 and at most 255"):
            poison(images, labels, preset=replace(poison.settings("smoke"), epsilon=epsilon))
    with pytest.raises(ValueError, match="epsilon is nan, but must be finite"):
        poison(images, labels, preset=replace(poison.settings("smoke"), epsilon=float("nan")))


@pytest.mark.parametrize("rate", [0.0, -0.1])
def test_what_is_accepted_is_what_the_sentence_says(rate):
    emn = poisons.get("emn")
    with pytest.raises(ValueError, match=f"learning_rate is {rate}, but must be above 0"):
        emn.settings(replace(emn.settings("smoke"), learning_rate=rate))


def numbers_of(settings):
    """Name, value and settings with another value for it, of each number; those of settings within settings, too."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            for name, inner, other in numbers_of(value):
                yield name, inner, lambda new, field=field, other=other: replace(settings, **{field.name: other(new)})
        elif type(value) in (int, float):
            yield field.name, value, lambda new, field=field: replace(settings, **{field.name: new})


@pytest.mark.parametrize("name", poisons.NAMES)
def test_numbers_that_no_method_could_use_are_refused(name):
    """Before anything is made: without steps there would be no noise, and nobody would be told."""
    poison = poisons.get(name)
    for preset in poison.presets.values():
        assert poison.settings(preset) is preset
    for field, value, with_value in numbers_of(poison.presets["published"]):
        refused = [-1.0, float("nan"), float("inf")] if type(value) is float else [-1]
        refused += [0] if field in ("steps", "epochs", "rounds", "batch_size", "samples") else []
        for wrong in refused:
            with pytest.raises(ValueError, match=f"{wrong}.* must|must .*{wrong}"):
                poison.settings(with_value(wrong))


@pytest.mark.parametrize(
    "name,change,sentence",
    [
        ("cuda", {"kernel_size": 4}, "kernel_size is 4, but must be at least 1 and odd."),
        ("pil", {"weight": 1.5}, "weight is 1.5, but must be at least 0 and at most 1."),
        ("aue", {"strength": 2}, "strength is 2, but must be at least 0 and at most 1."),
        ("aap", {"strength": 2.0}, "strength is 2.0, but must be at least 0 and at most 1."),
        ("aap", {"warmup": 3}, "warmup is 3, but must be at least 0 and at most epochs, 2."),
        ("emn-class", {"subset": 20.0}, "subset is 20.0, but must be above 0 and at most 1."),
        ("emn-class", {"subset": 0.0}, "subset is 0.0, but must be above 0 and at most 1."),
        ("emn", {"stop_error": 50.0}, "stop_error is 50.0, but must be at least 0 and at most 1."),
        ("emn", {"momentum": 1.5}, "momentum is 1.5, but must be at least 0 and below 1."),
        ("cp-s", {"momentum": 1.0}, "momentum is 1.0, but must be at least 0 and below 1."),
        ("remn", {"adversary_epsilon": 256.0}, "adversary_epsilon is 256.0, .* at most 255, in 1/255."),
        ("lsp", {"level": 1.5}, "level is 1.5, but must be above 0 and at most 1."),
        ("uc", {"last_learning_rate": 0.1}, "last_learning_rate is 0.1, .* at most learning_rate, 0.0001."),
        ("pil", {"weight": float("nan")}, "weight is nan, but must be finite, at least 0 and at most 1."),
        ("dune", {"recipe.momentum": 1.5}, "momentum is 1.5, but must be at least 0 and below 1."),
        ("cp-c", {"min_scale": 2.0}, "min_scale is 2.0, but must be above 0 and at most 1."),
    ],
)
def test_ranges_that_are_told_are_kept(name, change, sentence):
    poison = poisons.get(name)
    with pytest.raises(ValueError, match=sentence):
        poison.settings(poison.changed("smoke", change))


def test_a_whole_number_in_place_of_a_fraction_is_that_fraction():
    for number in (0, 1):
        poison = poisons.get("pil")
        poison.settings(poison.changed("smoke", {"weight": number}))


def test_what_is_no_number_does_not_become_an_image(data):
    noise = np.zeros((40, 3, 16, 16), dtype=np.float32)
    noise[7, 0, 3, 3] = np.nan
    with pytest.raises(ValueError, match="perturbation holds values that are no numbers"):
        apply_perturbation(data.images, noise)


def test_perturbation_must_fit_the_images(data):
    with pytest.raises(ValueError, match=r"perturbation has shape \(40, 16, 16, 3\).*\(40, 3, 16"):
        apply_perturbation(data.images, np.zeros((40, 16, 16, 3)))
    with pytest.raises(ValueError, match="images has dtype float64.*uint8"):
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
    with pytest.raises(ValueError, match=r"poisoned has shape \(1, 2, 2, 3\)"):
        measured_norms(clean, poisoned[:1])


def test_control_has_the_norms_of_the_poison_and_nothing_else(perturbation):
    made = control.shuffled(perturbation, seed=0)
    assert made.shape == perturbation.shape
    # The same sizes in every channel, elsewhere, and in another image.
    pixels, others = (noise.abs().flatten(2).sort(dim=2).values.flatten(1) for noise in (perturbation, made))
    assert torch.equal(torch.unique(pixels, dim=0), torch.unique(others, dim=0))
    changed, unchanged = (noise.flatten(2).ne(0).any(dim=1).sum(dim=1) for noise in (perturbation, made))
    assert torch.equal(changed.sort().values, unchanged.sort().values)
    assert not torch.equal(made, perturbation)
    assert torch.equal(made, control.shuffled(perturbation, seed=0))


def test_control_does_not_know_an_images_class():
    """Sizes of a class of their own, as AR's noise has, must not stay with the class."""
    labels = torch.arange(2000) % 2
    noise = torch.randn(2000, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * (1 + labels.view(-1, 1, 1, 1))
    sizes = control.shuffled(noise, seed=0).flatten(1).norm(dim=1)
    of_zero, of_one = sizes[labels == 0], sizes[labels == 1]
    assert abs(of_zero.mean() - of_one.mean()) < 4 * sizes.std() * (2 / 1000) ** 0.5


def test_control_of_a_set_is_its_own_noise_elsewhere(data):
    protected = data.with_images(apply_perturbation(data.images, 8 / 255 * torch.ones(40, 3, 16, 16)))
    made = control.norm_matched(data, protected, seed=3)
    assert made.ids == data.ids and np.array_equal(made.labels, data.labels)
    noise = control.shuffled(protected.tensor() - data.tensor(), seed=3)
    assert np.array_equal(made.images, apply_perturbation(data.images, noise))
    with pytest.raises(ValueError, match="protected has 40 ids"):
        control.norm_matched(data, protected.subset(range(39, -1, -1)), seed=3)


@dataclass(frozen=True)
class BrightnessSettings:
    """Numbers of brightness: `level`, in [0, 1]."""

    level: float = 0.1


def test_a_method_without_labels_is_given_none(images, labels):
    def perturb(images, labels, settings, **options):
        assert labels is None
        return settings.level * torch.ones_like(images)

    preset = {"published": BrightnessSettings()}
    poison = Poison("brightness", "B", "an example", preset, lambda settings, shape: {}, perturb, uses_labels=False)
    assert torch.equal(poison(images, labels), poison(images)) and poison(images).eq(0.1).all()
