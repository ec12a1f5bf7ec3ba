"""What every countermeasure must be, whatever its method: parametrised over the registry, so that a new one is tested by being in it."""

import copy
import dataclasses
import importlib
import pkgutil
import re
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from tiny import tiny_unet

from jcdp_diffusers import (
    JointConditionalPurificationPipeline,
    PurificationConfig,
    countermeasures,
    engines,
    victims,
)
from jcdp_diffusers.countermeasures import KINDS, LEARNING, Context
from jcdp_diffusers.victims import HOOK_METHODS, Recipe, train_victim


QUICK = Recipe("quick", epochs=2, batch_size=32, learning_rate=0.05, width=2, max_steps_per_epoch=1)
# Guides need a perceptual network, and a hundred steps need time.
SHORT = PurificationConfig(diffusion_steps=3, num_inference_steps=2, pixel_guidance_scale=100.0)
NAMES = countermeasures.NAMES


@pytest.fixture(scope="module")
def purifier():
    return JointConditionalPurificationPipeline(tiny_unet(size=16), DDPMScheduler())


def test_who_needs_the_same_work_waits_until_it_is_done(tmp_path, monkeypatch):
    """As the victims of several seeds do, which would otherwise write to one file at the same time."""
    monkeypatch.setattr(engines, "_inside_task", True)
    context, found = Context(checkpoint_dir=tmp_path / "new"), []
    begun = threading.Event()

    def work():
        with context.place_for_work("same") as path:
            begun.set()
            found.append(path.exists())
            time.sleep(0.2)
            path.write_text("done")

    first, second = threading.Thread(target=work), threading.Thread(target=work)
    first.start()
    begun.wait()
    second.start()
    with context.place_for_work("other") as path:
        assert path == tmp_path / "new/other" and not (tmp_path / "new/same").exists()
    first.join()
    second.join()
    assert found == [False, True]


def test_without_a_folder_work_is_done_in_a_temporary_one():
    with Context().place_for_work("one") as path:
        path.write_text("done")
    assert not path.parent.exists()


@pytest.fixture
def prepare(purifier, collected, pairs_like):
    def prepare(name, data, **options):
        options = {"purifier": purifier, "collected": collected, "pairs": pairs_like(data)} | options
        return countermeasures.get(name).prepare(data, purification=SHORT, **options)

    return prepare


@pytest.fixture(scope="session")
def fit(quick_views):
    """Trains a victim, with labels where the countermeasure suits that."""

    def fit(name, prepared, test, **options):
        if "supervised" in countermeasures.get(name).suits:
            options |= {"recipe": QUICK}
        else:
            options |= {"recipe": quick_views, "method": "simclr", "probe": test}
        return train_victim(prepared.data, test, hooks=prepared.hooks, **options)

    return fit


@pytest.mark.parametrize("name", NAMES)
def test_names_itself_its_source_and_its_cost(name):
    measure = countermeasures.get(name)
    assert measure.name == name and measure.kind in KINDS and measure.source and measure.cost
    assert (measure.function is None) == (measure.kind == "combination")


def test_every_name_of_every_family_is_registered():
    families = [entry.name for entry in pkgutil.iter_modules(countermeasures.__path__)]
    modules = [importlib.import_module(f"jcdp_diffusers.countermeasures.{name}") for name in families]
    offered = [entry.name for module in modules for entry in getattr(module, "COUNTERMEASURES", ())]
    assert sorted(offered) == sorted(set(NAMES) - {"none", "eclipse"})


FORMS = ("bytes", "floats")


def stored(form):
    images = torch.randint(256, (8, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return images if form == "bytes" else images / 255


@pytest.mark.parametrize("name", NAMES)
def test_does_what_it_declares(name, prepared):
    """The declarations beside what the hooks do: labels, loss, and the form of stored images."""
    measure = countermeasures.get(name)
    assert set(measure.suits) <= set(LEARNING) and {measure.takes, measure.gives} <= set(FORMS)
    hooks = prepared(name).hooks
    replacing = [kind for kind in ("loss", "contrastive_loss") if any(hasattr(hook, kind) for hook in hooks)]
    assert measure.replaces_loss == bool(replacing)
    generator, gives, labels = torch.Generator().manual_seed(0), "bytes", torch.arange(8)
    for hook in hooks:
        if hasattr(hook, "before_augmentation"):
            kept = {form: hook.before_augmentation(stored(form), generator) for form in accepted(hook, FORMS)}
            assert set(kept) == {"bytes"} if measure.takes == "bytes" else set(kept) == set(FORMS)
            gives = "floats" if kept["bytes"].is_floating_point() else "bytes"
        if hasattr(hook, "before_forward"):
            _, changed = hook.before_forward(stored("floats"), labels, generator)
            assert ("contrastive" in measure.suits) == torch.equal(changed.float(), labels.float())
    assert measure.gives == gives
    if measure.replaces_loss:
        assert measure.suits == ({"loss": "supervised", "contrastive_loss": "contrastive"}[replacing[0]],)
    if measure.kind in ("dataset", "transform"):
        assert (measure.takes, measure.gives, measure.suits) == ("bytes", "bytes", LEARNING)


def accepted(hook, forms):
    """The forms of stored images that a hook does not refuse."""
    for form in forms:
        try:
            hook.before_augmentation(stored(form), torch.Generator().manual_seed(0))
        except ValueError:
            continue
        yield form


@pytest.mark.parametrize("name", [name for name in NAMES if "contrastive" in countermeasures.get(name).suits])
def test_contrastive_learning_needs_no_labels_for_it(name, prepare, few):
    if countermeasures.get(name).kind != "dataset":  # D-VAE's and the like keep their labels: they are given with it
        prepare(name, dataclasses.replace(few, labels=None))
    countermeasures.get(name).require_learning("simclr")


@pytest.mark.parametrize("name", [name for name in NAMES if "contrastive" not in countermeasures.get(name).suits])
def test_ways_of_learning_that_do_not_suit_are_refused(name):
    countermeasures.get(name).require_learning("supervised")
    with pytest.raises(ValueError, match=f"countermeasure is '{name}'.*'simclr'.*gray.*cutout.*random-noise.*advcl"):
        countermeasures.get(name).require_learning("simclr")


@pytest.mark.parametrize("name", [name for name in NAMES if "supervised" not in countermeasures.get(name).suits])
def test_learning_with_labels_is_refused_where_it_does_not_suit(name):
    with pytest.raises(ValueError, match=f"countermeasure is '{name}'.*'supervised'.*mixup.*at-8"):
        countermeasures.get(name).require_learning("supervised")


def test_combinations_declare_what_their_parts_do():
    measure = countermeasures.get("fast-autoaugment+orthogonal-projection+at-4")
    assert (measure.takes, measure.gives, measure.replaces_loss) == ("bytes", "floats", True)
    assert measure.suits == ("supervised",) and countermeasures.get("gray+cutout").suits == LEARNING


@pytest.mark.parametrize(
    "name, said",
    [
        ("orthogonal-projection+fast-autoaugment", "fast-autoaugment before orthogonal-projection"),
        ("orthogonal-projection+cutout+fast-autoaugment", "fast-autoaugment before orthogonal-projection"),
        ("at-4+ueraser", "at-4 and ueraser"),
        ("gray+at-4+at-8", "at-4 and at-8"),
        ("unconditional+gray+unconditional", "unconditional once at most"),
    ],
)
def test_parts_that_cannot_stand_together_are_refused(name, said):
    with pytest.raises(ValueError, match=f"countermeasure is '{re.escape(name)}'.*{said}"):
        countermeasures.get(name)


def test_images_that_a_part_cannot_take_are_refused_before_any_work(few):
    grey, line = few.with_images(few.images[..., :1]), few.with_images(few.images[:, :1])
    with pytest.raises(ValueError, match="data has images of 1 channel, but must have 3 for ueraser-lite"):
        countermeasures.get("unconditional+ueraser-lite").require_images(grey)
    with pytest.raises(ValueError, match="data has images of 1x16, but must have sides of at least 2 pixels for coin"):
        countermeasures.get("unconditional+coin").require_images(line)


@pytest.mark.parametrize("victim", victims.NAMES)
def test_trains_any_victim(victim, photos):
    prepared = countermeasures.get("jpeg-10+corruption+mixup+at-4").prepare(photos)
    recipe = dataclasses.replace(QUICK, batch_size=8)
    result = train_victim(prepared.data, photos, victim=victim, width=4, recipe=recipe, hooks=prepared.hooks)
    assert np.isfinite(result.history[-1]["train_loss"])


def weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


@pytest.fixture(scope="module")
def few(train):
    """Each with a speck, without which a filter for outliers has nothing to do."""
    specks = train.images[:48].copy()
    specks[:, 3, 5] = 255
    return train.subset(range(48)).with_images(specks)


@pytest.fixture(scope="module")
def plainly_learned(few, test, quick_views):
    """Weights by way of learning."""
    contrastive = {"recipe": quick_views, "method": "simclr", "probe": test}
    options = {"supervised": {"recipe": QUICK}, "contrastive": contrastive}
    return {learning: weights(train_victim(few, test, seed=1, **options[learning]).model) for learning in options}


@pytest.fixture(scope="module")
def kept():
    return {}


@pytest.fixture
def prepared(kept, prepare, few):
    """`prepared(name)`: as it was prepared by the first test of a countermeasure, with the seed 1."""

    def prepared(name):
        if name not in kept:
            kept[name] = prepare(name, few, seed=1)
        return kept[name]

    return prepared


@pytest.mark.parametrize("name", NAMES)
def test_a_smoke_run_takes_the_same_with_smaller_numbers_and_few_images(name, few):
    quick, whole = countermeasures.get(name, smoke=True), countermeasures.get(name)
    smaller = {"settings", "function", "check", "smoke", "least_collected", "parts"}
    declared = {field.name for field in dataclasses.fields(whole)} - smaller
    assert all(getattr(quick, one) == getattr(whole, one) for one in declared)
    assert quick.least_collected <= 8 and quick.needs_collected == whole.needs_collected
    quick.require_images(few)
    assert (whole.smoke is None) or max(quick.settings.get("epochs", 0), *quick.settings.get("clusters", (0,))) <= 5


def _cut_off(entry):
    raise KeyboardInterrupt


# One of several that differ in a number alone.
ALIKE = ("jpeg-30", "jpeg-50", "jpeg-70", "jpeg-75", "jpeg-90", "jpeg-95", "jcdp-code", "diffpure-l2", "d-vae-small", "at-8",
         "advcl-plain", "paired-small")  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALIKE])
def test_trains_a_victim_by_name_and_the_same_under_one_seed(
    name, prepare, prepared, fit, few, test, plainly_learned, tmp_path
):
    """
    Composition: every countermeasure, the same two lines; it does something, nothing but the victim changes, and a
    training that was cut off ends as if it had not been.
    """
    before = few.images.copy(), test.images.copy(), torch.get_rng_state()
    again = prepare(name, few, seed=1)
    result = fit(name, again, test, seed=1)
    assert np.isfinite(result.history[-1]["train_loss"])
    assert result.confusion.sum() == len(test)
    after = few.images, test.images, torch.get_rng_state()
    assert all(np.array_equal(one, other) for one, other in zip(before, after))
    assert np.array_equal(again.data.images, prepared(name).data.images)
    if again.hooks:  # else it is the same training
        afresh = copy.deepcopy(prepared(name))  # as another process would prepare it
        with pytest.raises(KeyboardInterrupt):
            fit(name, prepared(name), test, seed=1, checkpoint_dir=tmp_path, progress=_cut_off)
        assert torch.equal(
            weights(result.model), weights(fit(name, afresh, test, seed=1, checkpoint_dir=tmp_path).model)
        )
    plain = plainly_learned[countermeasures.get(name).suits[0]]
    assert torch.equal(weights(result.model), plain) is (name == "none")


@pytest.mark.parametrize("name", NAMES)
def test_keeps_rows_and_labels_and_makes_one_hook_per_hook(name, prepared, few):
    measure, prepared = countermeasures.get(name), prepared(name)
    data = prepared.data
    assert data.ids == few.ids and np.array_equal(data.labels, few.labels)
    assert data.images.shape == few.images.shape and data.images.dtype == np.uint8
    assert all(any(hasattr(hook, method) for method in HOOK_METHODS) for hook in prepared.hooks)
    kinds = [part.kind for part in measure.parts] if measure.kind == "combination" else [measure.kind]
    assert len(prepared.hooks) == kinds.count("hook")
    if set(kinds) <= {"hook"}:
        assert data is few


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("ueraser") and name not in ALIKE])
def test_works_on_grey_images(name, fit, few, test, collected, pairs_like):
    def grey(data):
        return data.with_images(data.images[..., :1])

    purifier = JointConditionalPurificationPipeline(tiny_unet(channels=1, size=16), DDPMScheduler())
    options = {"purifier": purifier, "purification": SHORT, "collected": grey(collected)}
    prepared = countermeasures.get(name).prepare(grey(few), pairs=pairs_like(grey(few)), **options)
    assert fit(name, prepared, grey(test)).confusion.sum() == len(test)


@pytest.mark.parametrize("name", ["jpeg-10+corruption", "gray+cutout+mixup", "orthogonal-projection+cutmix+at-4"])
def test_several_at_once(name, train, test):
    measure = countermeasures.get(name)
    assert "+".join(part.name for part in measure.parts) == name == "+".join(measure.settings)
    prepared = measure.prepare(train)
    assert train_victim(prepared.data, test, recipe=QUICK, hooks=prepared.hooks).confusion.sum() == len(test)


def test_combinations_of_combinations_are_flat(purifier, train):
    measure = countermeasures.get("none+gray+eclipse")
    assert [part.name for part in measure.parts] == ["gray", "eclipse-purifier", "corruption"]
    assert measure.needs_purifier


def test_order_matters(train):
    one, other = (countermeasures.get(name).prepare(train).data.images for name in ("gray+bdr-2", "bdr-2+gray"))
    assert not np.array_equal(one, other)


def test_classes_are_counted_by_name_or_label(train):
    nameless = dataclasses.replace(train, class_names=None)
    few = nameless.subset(nameless.labels < 7)
    assert countermeasures.get("mixup").prepare(train).hooks[0].num_classes == 10
    assert countermeasures.get("mixup").prepare(few).hooks[0].num_classes == 7
    assert countermeasures.get("mixup").prepare(few, num_classes=12).hooks[0].num_classes == 12


@pytest.mark.parametrize("name", ["prayer", "gray+prayer", "", "gray+"])
def test_unknown_names_are_refused(name):
    unknown = name.removeprefix("gray+")
    with pytest.raises(ValueError, match=f"countermeasure is '{unknown}'.*none, eclipse, "):
        countermeasures.get(name)


@pytest.mark.parametrize("name", [name for name in NAMES if countermeasures.get(name).needs_purifier])
def test_a_purifier_that_is_missing(name, train):
    with pytest.raises(ValueError, match=f"purifier is None.*'{name}'"):
        countermeasures.get(name).prepare(train)


@pytest.mark.parametrize("name", [name for name in NAMES if countermeasures.get(name).needs_pairs])
def test_pairs_that_are_missing_and_what_they_assume(name, train):
    measure = countermeasures.get(f"{name}+cutout")
    assert measure.needs_pairs and measure.assumes == countermeasures.get(name).assumes != ""
    with pytest.raises(ValueError, match=f"pairs is None.*'{re.escape(name)}"):
        measure.prepare(train)


def test_only_pairs_assume_more():
    assert {name for name in NAMES if countermeasures.get(name).assumes} == {"paired", "paired-small"}


@pytest.mark.parametrize("name", ["ueraser-lite", "ueraser", "ueraser-max"])
def test_ueraser_needs_colour(name, train):
    with pytest.raises(ValueError, match=f"data has images of 1 channel.*{name}"):
        countermeasures.get(name).prepare(train.with_images(train.images[..., :1]))


def test_projection_needs_labels(train):
    with pytest.raises(ValueError, match="data has no labels.*orthogonal-projection"):
        countermeasures.get("orthogonal-projection").prepare(dataclasses.replace(train, labels=None))


def test_context_is_what_prepare_is_given(train):
    """A new countermeasure is a function; what it is given is documented by `Context`."""
    seen = {}

    def look(data, context):
        seen.update(dataclasses.asdict(context))
        return data

    measure = dataclasses.replace(countermeasures.get("jcdp"), kind="dataset", function=look)
    measure.prepare(copy.deepcopy(train), seed=3, purifier="somewhere", checkpoint_dir="folder", progress=True)
    assert set(seen) == {field.name for field in dataclasses.fields(Context)}
    assert (seen["seed"], seen["purifier"], seen["num_classes"], str(seen["checkpoint_dir"])) == (
        3,
        "somewhere",
        10,
        "folder",
    )
