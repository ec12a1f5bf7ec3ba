"""Networks that somebody else trained: features, normalisation, local files, and what is refused."""

import sys

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from jcdp_diffusers.poisons import pretrained


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """torchvision's network with random weights, and a file of them."""
    torch.manual_seed(1)
    network = torchvision.models.squeezenet1_0().eval()
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(network.state_dict(), path)
    return network, path


def normalised(images, name="imagenet"):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in pretrained.NORMALISATIONS[name])
    return (images - mean) / std


def test_features_of_squeezenet_are_what_its_last_convolution_reads(images, squeezenet):
    network, path = squeezenet
    features = pretrained.load("squeezenet1_0", weights=str(path))(images)
    assert features.shape == (3, 512) and features.dtype == torch.float32
    torch.testing.assert_close(features, network.features(normalised(images)).mean(dim=(2, 3)))
    plain = pretrained.load("squeezenet1_0", weights=str(path), normalisation="none")(images)
    torch.testing.assert_close(plain, network.features(images).mean(dim=(2, 3)))


def test_features_of_resnet50_give_its_logits(images, tmp_path):
    torch.manual_seed(1)
    network = torchvision.models.resnet50().eval()
    # As programs save it: below `state_dict`, of a network on several devices.
    weights = {f"module.{key}": value for key, value in network.state_dict().items() if "batches" not in key}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "RN50.pth")
    features = pretrained.load("resnet50", weights=str(tmp_path / "RN50.pth"))(images)
    assert features.shape == (3, 2048)
    torch.testing.assert_close(network.fc(features), network(normalised(images)), rtol=1e-4, atol=1e-4)


def test_features_of_clip_are_its_image_embedding(tmp_path, images):
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16,
        projection_dim=24,
    )  # fmt: skip
    torch.manual_seed(1)
    tower = CLIPVisionModelWithProjection(config).eval()
    tower.save_pretrained(tmp_path)
    network = pretrained.load("clip", weights=str(tmp_path))
    torch.testing.assert_close(network(images), tower(pixel_values=normalised(images, "clip")).image_embeds)
    network.require_side(64, "view_size")
    with pytest.raises(ValueError, match="view_size is 65.*64"):
        network.require_side(65, "view_size")


def test_networks_are_frozen_and_images_have_gradients(images):
    network = pretrained.load("squeezenet1_0", weights="random")
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    seen = images.clone().requires_grad_()
    network(seen).sum().backward()
    assert seen.grad.abs().sum() > 0


def test_grey_images_are_seen_as_colourless_ones(images):
    network = pretrained.load("squeezenet1_0", weights="random")
    torch.testing.assert_close(network(images[:, :1]), network(images[:, :1].repeat(1, 3, 1, 1)))


def test_random_weights_depend_on_the_seed_alone(images):
    before = torch.get_rng_state()
    one, same, other = (pretrained.load("clip-tiny", weights="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    small = images[:, :, :32, :32]
    assert torch.equal(one(small), same(small)) and not torch.equal(one(small), other(small))


class Payload:
    """Would run code on unpickling."""

    def __reduce__(self):
        return (print, ("unpickled",))


def test_files_that_cannot_be_taken_are_refused(tmp_path, squeezenet, capfd):
    with pytest.raises(ValueError, match="weights is '.*none.pth'.*exists"):
        pretrained.load("resnet50", weights=str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match="weights is 'squeezenet.safetensors'.*resnet50: 'conv1"):
        pretrained.load("resnet50", weights=str(squeezenet[1]))
    torch.save({"state_dict": Payload()}, tmp_path / "code.pth")
    (tmp_path / "cut.safetensors").write_bytes(squeezenet[1].read_bytes()[:999])
    for name in ("code.pth", "cut.safetensors"):
        with pytest.raises(ValueError, match=f"weights is '{name}'.*safetensors"):
            pretrained.load("squeezenet1_0", weights=str(tmp_path / name))
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="weights is 'tensor.pth'.*squeezenet1_0"):
        pretrained.load("squeezenet1_0", weights=str(tmp_path / "tensor.pth"))
    assert "unpickled" not in capfd.readouterr().out


def test_names_that_are_unknown_are_refused(tmp_path):
    with pytest.raises(ValueError, match="surrogate is 'vgg'.*resnet50, squeezenet1_0, clip"):
        pretrained.load("vgg")
    with pytest.raises(ValueError, match="normalisation is 'mean'.*imagenet, clip, none"):
        pretrained.load("resnet50", normalisation="mean")
    with pytest.raises(ValueError, match="weights is '.*'.*CLIP"):
        pretrained.load("clip", weights=str(tmp_path))


def test_a_download_that_fails_is_one_sentence(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(ValueError, match="weights is None.*resnet50.*no route.*local file"):
        pretrained.load("resnet50")


def test_open_clip_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match=r"surrogate is 'open-clip-rn50'.*jcdp-diffusers\[open-clip\]"):
        pretrained.load("open-clip-rn50")


@pytest.mark.long
def test_features_of_open_clip_are_its_image_embedding(tmp_path):
    import open_clip

    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    tower = open_clip.create_model("RN50", pretrained=None).visual.eval()
    # As the authors save it: part of a network that has a last layer for classes.
    torch.save({f"visual_encoder.{key}": value for key, value in tower.state_dict().items()}, tmp_path / "clip.pth")
    network = pretrained.load("open-clip-rn50", weights=str(tmp_path / "clip.pth"))
    torch.testing.assert_close(network(images), tower(normalised(images, "clip")))
    assert network(images).shape == (2, 1024)
    with pytest.raises(ValueError, match="view_size is 64.*224"):
        network.require_side(64, "view_size")
    with pytest.raises(ValueError, match="weights is 'laion'.*'random' or one of openai"):
        pretrained.load("open-clip-rn50", weights="laion")
