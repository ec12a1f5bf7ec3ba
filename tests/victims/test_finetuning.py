"""Victims that start from pretrained weights: what is read, what is refused, and what stays as it was."""

import copy
import dataclasses
import json

import pytest
import torch
from digits import QUICK, digits
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from safetensors.torch import save_file
from torchvision.models import vgg16_bn

from jcdp_diffusers import countermeasures, victims
from jcdp_diffusers.data import LabelledImages
from jcdp_diffusers.victims import get_recipe, train_victim
from jcdp_diffusers.victims.finetuning import (
    PLAIN,
    InitFrom,
    Normalisation,
    Weights,
    facts_of,
    finetuning_recipe,
    pretrain,
    pretraining_recipe,
    read_weights,
    save_weights,
    start_from,
    start_of,
)
from jcdp_diffusers.victims.networks import last_layer


SIMCLR = dataclasses.replace(get_recipe("smoke", "simclr"), epochs=3, width=4, max_steps_per_epoch=2)
AIRBENCH = dataclasses.replace(get_recipe("airbench"), epochs=2, batch_size=32, width=4, max_steps_per_epoch=3)
SHORT = dataclasses.replace(QUICK, epochs=1, width=4, max_steps_per_epoch=3)


@pytest.fixture(scope="module")
def train():
    data = digits(0, 100)
    return data.with_images(data.images.repeat(3, axis=3))


@pytest.fixture(scope="module")
def test():
    data = digits(100, 200)
    return data.with_images(data.images.repeat(3, axis=3))


def started(victim: str, train: LabelledImages, width: int = 4) -> Weights:
    """Weights of nobody's training, whose statistics are not those of a new network."""
    generator = torch.Generator().manual_seed(7)
    side, _, channels = train.images.shape[1:]
    model = victims.build(victim, 5, in_channels=channels, width=width, image_size=side)
    draw = lambda tensor: torch.rand(tensor.shape, generator=generator) * 0.1 + 0.05
    tensors = {
        name: draw(tensor) if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    return Weights("somewhere", tensors, victim, (channels, side, side))


@pytest.fixture
def saved(train, tmp_path):
    """A file as `jcdp score --model_dir` writes it."""
    weights = started("resnet18", train)
    save_weights(tmp_path / "resnet18-0.safetensors", weights, facts_of("resnet18", weights.shape) | {"trial": "x"})
    return tmp_path / "resnet18-0.safetensors"


# ---------------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("victim", victims.NAMES)
def test_lower_stages_are_the_first_that_see_an_image_and_about_half_of_the_network(victim):
    model = victims.get(victim)(3, in_channels=3, width=8)
    seen = []
    for stage in model.lower_stages():
        stage.register_forward_hook(lambda *_: seen.append("lower"))
    last_layer(model).register_forward_hook(lambda *_: seen.append("last"))
    model.eval()(torch.rand(2, 3, 32, 32))
    assert seen == ["lower"] * len(model.lower_stages()) + ["last"]
    lower = {id(parameter) for stage in model.lower_stages() for parameter in stage.parameters()}
    assert 0 < len(lower) <= 0.75 * len(list(model.parameters()))


@pytest.mark.parametrize("measure", ["none", "at-4"])
@pytest.mark.parametrize("victim, recipe", [("resnet18", SHORT), ("convnet94", AIRBENCH)])
def test_frozen_stages_keep_weights_and_statistics(victim, recipe, measure, train, test):
    weights = started(victim, train)
    hooks = countermeasures.get(measure).prepare(train).hooks
    model = train_victim(
        train, test, victim=victim, recipe=recipe, hooks=hooks, init_from=weights, finetune="upper"
    ).model
    names = {id(module): name for name, module in model.named_modules()}
    lower = tuple(f"{names[id(stage)]}." for stage in model.lower_stages())
    kept = {name for name in model.state_dict() if name.startswith(lower)}
    assert any("running_mean" in name for name in kept)
    for name, tensor in model.state_dict().items():
        if name in kept:
            assert torch.equal(tensor, weights.tensors[name].to(tensor.dtype)), name
    changed = [
        name
        for name, tensor in model.state_dict().items()
        if name not in kept and tensor.is_floating_point() and tensor.shape == weights.tensors[name].shape
        and not torch.equal(tensor, weights.tensors[name])
    ]  # fmt: skip
    assert any("running_mean" in name for name in changed) and any("conv" in name or ".0." in name for name in changed)


def test_all_weights_change_where_all_are_fine_tuned_and_the_last_layer_is_a_new_one(train, test):
    weights = started("resnet18", train)
    result = train_victim(train, test, recipe=SHORT, init_from=weights)
    state = result.model.state_dict()
    body = [name for name in state if not name.startswith("fc.") and state[name].is_floating_point()]
    assert all(not torch.equal(state[name], weights.tensors[name]) for name in body)
    assert state["fc.weight"].shape[0] == 10 and weights.classes == 5
    assert result.settings["init_from"] == weights.digest and result.settings["finetune"] == "all"
    again = train_victim(train, test, recipe=SHORT, init_from=weights)
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in state.items())


def test_a_tenth_of_the_learning_rate_and_nothing_else(train, test):
    plain = train_victim(train, test, recipe=SHORT).history[0]["learning_rate"]
    tuned = train_victim(train, test, recipe=SHORT, init_from=started("resnet18", train)).history[0]["learning_rate"]
    assert tuned == pytest.approx(plain / 10)
    assert dataclasses.replace(finetuning_recipe(QUICK), learning_rate=QUICK.learning_rate) == QUICK


def test_a_network_that_names_no_lower_stages(train, test, monkeypatch):
    monkeypatch.delattr(victims.networks.ResNet18, "lower_stages")
    with pytest.raises(ValueError, match="finetune is 'upper'.*'all'.*'resnet18'"):
        train_victim(train, test, recipe=SHORT, init_from=started("resnet18", train), finetune="upper")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"finetune": "upper"}, "finetune is 'upper', .* 'all' where init_from is None"),
        ({"init_from": Weights("w", {}), "finetune": "head"}, "finetune is 'head', .* all, upper"),
        ({"init_from": Weights("w", {}), "method": "simclr"}, "init_from is 'w', .* None for method 'simclr'"),
        ({"init_from": Weights("w", {}), "victim": "convnet94", "whitening": True}, "whitening has 100 images"),
    ],
)
def test_what_does_not_go_with_pretrained_weights(changes, message, train, test):
    options = {"recipe": SHORT} | changes
    if changes.get("method"):
        options |= {"probe": train, "recipe": SIMCLR}
    if changes.get("whitening"):
        options |= {"whitening": train}
    with pytest.raises(ValueError, match=message):
        train_victim(train, test, **options)


# ---------------------------------------------------------------------------------------------------------- pretraining


def learn(images: LabelledImages, **options) -> Weights:
    return pretrain(images, victim="resnet18", width=4, recipe=SIMCLR, **options)


def test_pretraining_has_the_same_bits_under_one_seed_and_reads_no_labels(train):
    one, other = learn(train), learn(dataclasses.replace(train, labels=None))
    assert one.digest == other.digest != learn(train, seed=1).digest
    assert not any(name.startswith("fc.") for name in one.tensors) and one.shape == (3, 16, 16)
    assert learn(train.with_images(255 - train.images)).digest != one.digest


def test_pretraining_that_was_cut_off_goes_on_to_the_same_bits(train, tmp_path, monkeypatch):
    from jcdp_diffusers.victims import checkpoints

    save = checkpoints.Checkpoint.save

    def save_and_stop(self, history):
        save(self, history)
        if len(history) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints.Checkpoint, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        learn(train, checkpoint_dir=tmp_path)
    monkeypatch.setattr(checkpoints.Checkpoint, "save", save)
    assert learn(train, checkpoint_dir=tmp_path).digest == learn(train).digest


def test_pretraining_learns_what_tells_images_apart(train, test):
    """Of its features, the nearest neighbours get more digits right than of random weights."""
    from jcdp_diffusers.victims import evaluation
    from jcdp_diffusers.victims.linear_probe import knn_accuracy

    recipe = dataclasses.replace(get_recipe("digits", "simclr"), epochs=8, width=4)
    weights = pretrain(train, victim="resnet18", width=4, recipe=recipe)
    torch.manual_seed(0)
    model = victims.get("resnet18")(2, width=4)
    found = []
    for tensors in ({}, weights.tensors):
        model.load_state_dict(tensors, strict=False)
        features = [
            evaluation.features(model, torch.from_numpy(part.images).permute(0, 3, 1, 2)) for part in (train, test)
        ]
        found.append(
            knn_accuracy(features[0], torch.from_numpy(train.labels), features[1], torch.from_numpy(test.labels))
        )
    assert found[1] > found[0] + 0.1


def test_the_recipe_of_the_pretraining_follows_the_victims():
    assert pretraining_recipe(get_recipe("mini")) == get_recipe("mini", "simclr")
    assert pretraining_recipe(get_recipe("apbench")) == get_recipe("fast", "simclr")


def test_too_few_collected_images_and_none(train):
    with pytest.raises(ValueError, match="collected has 3 images, .* 8, the batch_size"):
        InitFrom(train.subset(range(3)), recipe=SIMCLR)
    with pytest.raises(ValueError, match="collected is None, .* 'collected'"):
        start_of("collected", "all", None, QUICK)
    assert start_of(None, "all", train, QUICK) is None


# ------------------------------------------------------------------------------------------------- somebody's weights


def test_what_jcdp_score_keeps_can_be_read_from_the_file_and_its_folder(saved, train, test):
    for source in (saved, saved.parent):
        weights = read_weights(source)
        assert (weights.victim, weights.shape, weights.classes) == ("resnet18", (3, 16, 16), 5)
        assert weights.digest == started("resnet18", train).digest
    model = train_victim(train, test, recipe=SHORT, init_from=weights, finetune="upper").model
    assert torch.equal(model.conv1.weight, weights.tensors["conv1.weight"])


def test_torchvisions_names_of_the_same_network(tmp_path, train, test):
    with torch.device("meta"):  # its classifier has 120 million weights, which are left out here
        theirs = vgg16_bn(num_classes=7).state_dict()
    theirs = {
        name: torch.rand(tensor.shape).mul(0.1).half() if tensor.is_floating_point() else torch.tensor(1)
        for name, tensor in theirs.items()
        if not name.startswith(("classifier.0", "classifier.3"))
    }
    save_file(theirs, tmp_path / "model.safetensors")
    weights = read_weights(tmp_path)
    assert weights.classes == 7 and weights.victim is None
    recipe = dataclasses.replace(SHORT, max_steps_per_epoch=1)
    how = {"victim": "vgg16", "width": 64, "recipe": recipe}
    train_victim(train, test, init_from=weights, **how)
    with pytest.raises(ValueError, match="finetune is 'upper', but must be 'all' for init_from"):  # it says nothing
        train_victim(train, test, init_from=weights, finetune="upper", **how)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.0] * 3, "std": [1.0] * 3}}))
    model = train_victim(train, test, init_from=read_weights(tmp_path), finetune="upper", **how).model
    assert torch.equal(model.body[0][0].weight, theirs["features.0.weight"].float())


SCALE = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))


def timms(folder, tensors, at_the_top=False, **entries):
    """A folder as timm publishes one."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    entries = {"input_size": [3, 16, 16]} | entries
    (folder / "config.json").write_text(json.dumps(entries if at_the_top else {"pretrained_cfg": entries}))
    return folder


def scaled(scale=SCALE):
    return {"mean": list(scale.mean), "std": list(scale.std)}


@pytest.mark.parametrize("at_the_top", [False, True])
@pytest.mark.parametrize("victim", [name for name in victims.NAMES if name != "convnet94"])
def test_images_are_normalised_as_timms_config_says(victim, at_the_top, train, tmp_path):
    folder = timms(tmp_path, started(victim, train, width=8).tensors, at_the_top, **scaled())
    weights = read_weights(folder / "model.safetensors")
    assert weights.normalisation == SCALE == read_weights(folder).normalisation
    plain, normalising = (victims.get(victim)(5, in_channels=3, width=8).eval() for _ in range(2))
    start_from(plain, dataclasses.replace(weights, normalisation=PLAIN), victim, (16, 16, 3), "upper")
    start_from(normalising, weights, victim, (16, 16, 3), "upper")
    images = train.tensor()[:4]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (SCALE.mean, SCALE.std))
    wanted = plain.features((images - mean) / std)
    torch.testing.assert_close(normalising.features(images), wanted)
    torch.testing.assert_close(copy.deepcopy(normalising).features(images), wanted)
    assert not torch.allclose(plain.features(images), wanted)


def test_records_and_kept_victims_say_how_images_are_normalised(train, test, tmp_path):
    weights = read_weights(timms(tmp_path, started("resnet18", train).tensors, **scaled()))
    result = train_victim(train, test, recipe=SHORT, init_from=weights)
    assert result.settings["normalisation"] == dataclasses.asdict(SCALE)
    facts = facts_of("resnet18", weights.shape, weights.normalisation)
    save_weights(tmp_path / "kept" / "resnet18-0.safetensors", result.model, facts)
    kept = read_weights(tmp_path / "kept")
    assert (kept.victim, kept.shape, kept.normalisation) == ("resnet18", (3, 16, 16), SCALE)


@pytest.mark.parametrize(
    "entries, normalisation", [({}, None), ({"mean": [0, 0, 0], "std": [1, 1, 1]}, PLAIN), ({"mean": [0.5] * 3}, None)]
)
def test_images_stay_as_they_are_where_nothing_else_is_said(entries, normalisation, train, test, tmp_path):
    weights = read_weights(timms(tmp_path, started("resnet18", train).tensors, **entries))
    assert weights.normalisation == normalisation
    assert "normalisation" not in train_victim(train, test, recipe=SHORT, init_from=weights).settings
    if normalisation is None:
        with pytest.raises(ValueError, match="finetune is 'upper', but must be 'all' .* no config.json with mean and"):
            train_victim(train, test, recipe=SHORT, init_from=weights, finetune="upper")


@pytest.mark.parametrize(
    "mean, std, message",
    [
        ("0.5", [0.5], "mean is '0.5', but must be a list of numbers"),
        ([0.5], [], r"std is \[\], but must be a list of numbers"),
        ([0.5], [True], r"std is \[True\], but must be a list of numbers"),
        ([float("nan")], [0.5], r"mean is \[nan\], but must be a list of numbers"),
        ([0.5], [0.5, 0.5], r"std is \[0.5, 0.5\], but must be numbers above 0, as many as mean has"),
        ([0.5], [0], r"std is \[0.0\], but must be numbers above 0, as many as mean has"),
    ],
)
def test_normalisations_that_cannot_be(mean, std, message, train, tmp_path):
    folder = timms(tmp_path, started("resnet18", train).tensors, mean=mean, std=std)
    with pytest.raises(ValueError, match=f"init_from is '.*', whose {message}"):
        read_weights(folder)


def test_normalisations_that_do_not_suit_a_victim(train, test, tmp_path):
    two = dataclasses.replace(started("resnet18", train), normalisation=Normalisation((0.5,) * 2, (0.5,) * 2))
    with pytest.raises(ValueError, match="init_from is .* had mean .* but must have 3 numbers of each"):
        train_victim(train, test, recipe=SHORT, init_from=two)
    weights = dataclasses.replace(started("convnet94", train), normalisation=SCALE)
    with pytest.raises(ValueError, match="must have seen values in .* for victim 'convnet94', which whitens them"):
        train_victim(train, test, victim="convnet94", recipe=AIRBENCH, init_from=weights)


def write(folder, tensors, **metadata):
    save_file(tensors, folder / "model.safetensors", metadata=metadata or None)
    return folder


@pytest.mark.parametrize(
    "case, message",
    [
        ("architecture", "which is a vgg16, but must be a resnet18"),
        ("size", "images of 3x28x28, but must .* 3x16x16"),
        ("timm's size", "images of 3x224x224, but must .* 3x16x16"),
        ("channels", "conv1.weight has the shape 4x1x3x3, but must have 4x3x3x3"),
        ("stem", "conv1.weight has the shape 4x3x7x7, but must have 4x3x3x3"),
        ("width", "bn1.bias has the shape 8, but must have 4,"),
        ("missing", "has no layer3.0.conv1.weight, but must have all .* 'resnet18'"),
        ("more", "has layer5.weight, but must have .* 'resnet18' alone"),
        ("not finite", "whose conv1.weight is not finite"),
    ],
)
def test_weights_that_do_not_fit(case, message, train, test, tmp_path):
    tensors = dict(started("resnet18", train, width=8 if case == "width" else 4).tensors)
    metadata = {}
    if case == "architecture":
        metadata = {"victim": "vgg16"}
    elif case == "size":
        metadata = {"images": "3x28x28"}
    elif case == "timm's size":
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 224, 224]}}))
    elif case == "channels":
        tensors["conv1.weight"] = tensors["conv1.weight"][:, :1].contiguous()
    elif case == "stem":
        tensors["conv1.weight"] = torch.zeros(4, 3, 7, 7)
    elif case == "missing":
        del tensors["layer3.0.conv1.weight"]
    elif case == "more":
        tensors["layer5.weight"] = torch.zeros(1)
    elif case == "not finite":
        tensors["conv1.weight"] = tensors["conv1.weight"] * float("nan")
    with pytest.raises(ValueError, match=f"init_from is .*{message}"):
        train_victim(train, test, recipe=SHORT, init_from=read_weights(write(tmp_path, tensors, **metadata)))


def test_sources_without_one_readable_file(tmp_path, saved):
    accepted = "but must be 'collected', a .safetensors file"
    (tmp_path / "model.pt").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=f"init_from is .*model.pt', {accepted}"):
        read_weights(tmp_path / "model.pt")
    (tmp_path / "other.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"holds other.safetensors, resnet18-0.safetensors, {accepted}"):
        read_weights(tmp_path)
    with pytest.raises(ValueError, match="other.safetensors is cut short"):
        read_weights(tmp_path / "other.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"holds no .safetensors file, {accepted}"):
        read_weights(tmp_path / "empty")
    with pytest.raises(ValueError, match=f"init_from is 'no/such-thing', which is no path .*{accepted}"):
        read_weights("no/such-thing")
    with pytest.raises(ValueError, match=f"init_from is 'no/such.safetensors', which is no file, {accepted}"):
        read_weights("no/such.safetensors")


def test_a_hub_that_cannot_be_reached_ends_in_one_sentence(monkeypatch):
    def unreachable(hub, name):
        raise HTTPError("[Errno -2] Name or service not known")

    monkeypatch.setattr(HfApi, "list_repo_files", unreachable)
    with pytest.raises(ValueError, match="init_from is 'no/such-thing', which is no path and no Hub id in reach"):
        read_weights("no/such-thing")
