"""Which network and recipe a victim has where they are not named."""

import argparse

import pytest

from jcdp_diffusers.victims import Recipe, choose
from jcdp_diffusers.victims.choice import LARGEST_SIDE, add_arguments


OWN = Recipe("own", epochs=1)


@pytest.mark.parametrize(
    "given, device, side, chosen",
    [
        ((None, None), "cpu", 32, ("convnet94", "airbench")),
        ((None, None), "cpu", 64, ("convnet94", "airbench")),
        ((None, None), "cpu", 9, ("convnet94", "airbench")),
        ((None, None), "cpu", 8, ("resnet18", "mini")),
        ((None, None), "cpu", 65, ("resnet18", "mini")),
        ((None, None), "cuda", 8, ("resnet18", "fast")),
        ((None, None), "cuda", 32, ("resnet18", "fast")),
        (("resnet18", None), "cpu", 32, ("resnet18", "fast")),
        (("vgg16", None), "cuda", 32, ("vgg16", "fast")),
        (("convnet94", None), "cuda", 32, ("convnet94", "airbench")),
        ((None, "mini"), "cpu", 32, ("resnet18", "mini")),
        ((None, OWN), "cpu", 32, ("resnet18", "own")),
        ((None, "airbench"), "cuda", 32, ("convnet94", "airbench")),
        ((None, "airbench-short"), "cpu", 32, ("convnet94", "airbench-short")),
        (("resnet18", "airbench"), "cpu", 32, ("resnet18", "airbench")),
        (("convnet94", "smoke"), "cpu", 9, ("convnet94", "smoke")),
    ],
)
def test_supervised(given, device, side, chosen):
    victim, recipe = choose(*given, device=device, shape=(side, side + 1, 3))
    assert (victim, recipe.name) == chosen


@pytest.mark.parametrize("short", [False, True])
def test_the_help_names_the_cases_of_a_cpu_and_the_usual_recipe(short):
    said = f"(on a CPU resnet18 with mini for images below 9 or above {LARGEST_SIDE} pixels, and for methods without labels)"
    parser = argparse.ArgumentParser()
    add_arguments(parser, short=short)
    texts = {action.dest: action.help for action in parser._actions}
    assert said in texts["victim"] and said in texts["protocol"]
    assert f"{'airbench-short' if short else 'airbench'} with convnet94" in texts["protocol"]


@pytest.mark.parametrize("given", [("convnet94", "smoke"), (None, "airbench-short")])
def test_images_that_a_network_does_not_take(given):
    with pytest.raises(ValueError, match="victim is 'convnet94'.* 8x9 .* 9 pixels"):
        choose(*given, device="cpu", shape=(8, 9, 3))


def test_an_audit_is_short():
    victim, recipe = choose(None, None, device="cpu", shape=(32, 32), short=True)
    assert (victim, recipe.name) == ("convnet94", "airbench-short")
    assert choose("convnet94", None, device="cuda", shape=(32, 32), short=True)[1].name == "airbench-short"
    assert choose(None, "airbench", device="cpu", shape=(32, 32), short=True)[1].name == "airbench"
    assert choose(None, None, device="cuda", shape=(32, 32), short=True)[1].name == "fast"


@pytest.mark.parametrize("device, recipe, width", [("cpu", "mini", 16), ("cuda", "fast", 64)])
def test_without_labels(device, recipe, width):
    victim, chosen = choose(None, None, "byol", device=device, shape=(32, 32))
    assert (victim, chosen.name, chosen.width, chosen.method) == ("resnet18", recipe, width, "byol")
    assert choose("convnet94", "digits", "byol", device=device, shape=(32, 32))[0] == "convnet94"


@pytest.mark.parametrize(
    "given, method, message",
    [
        (("lenet", None), "supervised", "victim is 'lenet'"),
        ((None, "quick"), "supervised", "recipe is 'quick'"),
        ((None, "airbench"), "simclr", "recipe is 'airbench'"),
        ((None, OWN), "simclr", "recipe is 'own'"),
        ((None, None), "rotation", "method is 'rotation'"),
    ],
)
def test_what_is_none_is_refused(given, method, message):
    with pytest.raises(ValueError, match=message):
        choose(*given, method, device="cpu", shape=(32, 32))
