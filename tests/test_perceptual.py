import re
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from jcdp_diffusers import LPIPSModel
from jcdp_diffusers.perceptual import TRUNKS, load_perceptual


def images(seed, size=64, channels=3):
    return torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_model(trunk):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LPIPSModel(trunk, calibrated=trunk != "squeezenet1_0")


@pytest.mark.parametrize(("net", "calibrated"), [("alex", True), ("vgg", True), ("squeeze", True), ("alex", False)])
def test_equal_to_the_lpips_package_bit_for_bit(net, calibrated):
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        reference = lpips.LPIPS(net=net, pnet_rand=True, lpips=calibrated, verbose=False)
    ours = LPIPSModel.from_lpips(reference)
    assert ours.name == ("lpips-" if calibrated else "features-") + net
    with torch.no_grad():
        assert torch.equal(ours(images(0), images(1)), reference(images(0), images(1)).flatten())


def test_the_calibrated_heads_come_from_the_wheel():
    import lpips

    with torch.random.fork_rng():
        ours = LPIPSModel.from_lpips(lpips.LPIPS(net="alex", pnet_rand=True, verbose=False))
    total = sum(head.weight.sum().item() for head in ours.heads)
    path = f"{lpips.__path__[0]}/weights/v0.1/alex.pth"
    expected = sum(value.sum().item() for value in torch.load(path, weights_only=True, map_location="cpu").values())
    assert total == pytest.approx(expected) and all((head.weight >= 0).all() for head in ours.heads)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_save_load_same_bits(trunk, tmp_path):
    model = random_model(trunk)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = LPIPSModel.from_pretrained(tmp_path)
    assert loaded.name == model.name and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(images(0), images(1)), model(images(0), images(1)))


@pytest.mark.parametrize("trunk", TRUNKS)
def test_smallest_input_works_and_one_pixel_less_is_refused(trunk):
    model = random_model(trunk)
    size = model.smallest_input
    assert torch.isfinite(model(images(0, size), images(1, size))).all()
    message = f"images are {size - 1}x{size - 1}, but must be at least {size}x{size} for the trunk '{trunk}'"
    with pytest.raises(ValueError, match=message):
        model.features(images(0, size - 1))
    # The table is right: without our check torch itself has no output there.
    model.smallest_input = 1
    with pytest.raises(RuntimeError):
        model.features(images(0, size - 1))


def test_stays_in_float32(tmp_path):
    model = random_model("alex").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    for one in (model, model.half(), LPIPSModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)):
        assert {t.dtype for t in [*one.parameters(), *one.buffers()]} == {torch.float32}
        assert one.shift.flatten().tolist() == pytest.approx([-0.030, -0.088, -0.188])


def test_grey_images_are_shown_to_all_channels():
    model, grey, other = random_model("alex"), images(0, channels=1), images(1, channels=1)
    assert torch.equal(model(grey, other), model(grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1)))


def test_trunk_file_matches_torchvisions_feature_maps(shared):
    """The shipped SqueezeNet 1.0 against torchvision's own module with the same weights."""
    from safetensors.torch import load_file
    from torchvision.models import squeezenet1_0

    path = shared / "weights" / "squeezenet1_0_imagenet.safetensors"
    reference = squeezenet1_0()
    reference.load_state_dict(load_file(path))
    model = LPIPSModel.from_trunk_file(path)
    x, wanted = (images(0) + 1) / 2, []
    for index, layer in enumerate(reference.features.eval()):
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # torchvision would overwrite the map taken before it
        x = layer(x)
        if index in (0, 3, 4, 5, 7, 8, 9, 10, 12):
            wanted.append(nn.functional.normalize(x, dim=1))
    for ours, theirs in zip(model.features(images(0)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_wrong_trunks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="trunk is 'resnet'"):
        LPIPSModel("resnet")
    with pytest.raises(ValueError, match="calibrated is True.*'squeezenet1_0'"):
        LPIPSModel("squeezenet1_0")
    save_file({"features.0.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="x.safetensors', .*features.0.weight.*shape"):
        LPIPSModel.from_trunk_file(tmp_path / "x.safetensors")


def test_networks_that_lpips_does_not_have_or_cannot_fetch_end_in_a_sentence(monkeypatch):
    import urllib.error

    import lpips

    with pytest.raises(ValueError, match="net is 'resnet'"):
        LPIPSModel.from_lpips("resnet")

    def offline(*args, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(lpips, "LPIPS", offline)
    with pytest.raises(OSError, match="net is 'alex', .*no route to host"):
        LPIPSModel.from_lpips("alex")


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 2752120\n"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


BREAKS = {
    "git-lfs pointer": lambda path: path.write_text(LFS_POINTER),
    "cut short": cut,
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: torch.save({"features.0.weight": torch.zeros(1)}, path),
}


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("source", ["trunk file", "folder"])
def test_broken_weights_are_named_in_one_sentence(source, broken, tmp_path):
    model = random_model("squeezenet1_0")
    if source == "folder":
        model.save_pretrained(tmp_path)
        name, path = tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"
    else:
        name = path = tmp_path / "trunk.safetensors"
        save_file({f"features.{key}": value for key, value in model.layers.state_dict().items()}, path)
    assert load_perceptual(name).name == "features-squeezenet1_0"
    BREAKS[broken](path)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_perceptual(name)
    assert "\n" not in str(caught.value) and ("git lfs pull" in str(caught.value)) == (broken == "git-lfs pointer")


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.json", "{"), ("config.json", "[]"), ("config.json", '{"trunk": "resnet"}'), ("config.json", None)],
)
def test_a_broken_configuration_is_named_too(name, content, tmp_path):
    random_model("alex").save_pretrained(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*but must") as caught:
        load_perceptual(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_trunk_of_half_precision_is_taken(tmp_path):
    model = random_model("squeezenet1_0")
    halves = {f"features.{key}": value.half() for key, value in model.layers.state_dict().items()}
    save_file(halves | {"classifier.1.bias": torch.zeros(3)}, tmp_path / "half.safetensors")
    loaded = load_perceptual(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(images(0), images(1)), model(images(0), images(1)), rtol=0.01, atol=1e-4)
