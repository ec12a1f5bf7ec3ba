"""Every victim by name: what it maps, what it counts, what it refuses; and the changes made for small images."""

import pytest
import torch
import torchvision

from jcdp_diffusers import victims


# At width 64 with 10 classes and 3 channels: the library's own network, less what small images do without.
PARAMETERS = {
    "resnet18": 11_173_962,
    "vgg16": 14_728_266,
    "densenet121": 6_956_426,
    "mobilenet_v2": 2_236_682,
    "vit": 5_362_762,
}


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", victims.NAMES)
@pytest.mark.parametrize("in_channels, size", [(3, 32), (1, 28)])
def test_maps_images_to_logits(name, in_channels, size):
    model = victims.get(name)(7, in_channels=in_channels, width=8)
    logits = model(torch.rand(2, in_channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", victims.NAMES)
def test_parameter_count_at_the_published_width(name):
    assert parameter_count(victims.get(name)(10)) == PARAMETERS[name]


@pytest.mark.parametrize("name", victims.NAMES)
def test_weights_follow_the_global_seed(name):
    def weights(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return torch.cat([p.flatten() for p in victims.get(name)(4, width=4).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_vgg16_is_torchvisions_apart_from_the_classifier():
    reference = torchvision.models.vgg16_bn().features.eval()
    ours = victims.get("vgg16")(10).eval()
    ours[0].load_state_dict(reference.state_dict())
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), ours[3](reference(images).flatten(1)))


@pytest.mark.parametrize(
    "name, features, size",
    [("densenet121", lambda model: model.features, 4), ("mobilenet_v2", lambda model: model.features, 4)],
)
def test_small_images_end_as_4x4_features(name, features, size):
    model = victims.get(name)(10, width=8)
    assert features(model)(torch.rand(2, 3, 32, 32)).shape[2:] == (size, size)


def test_vit_positions_matter():
    """A transformer without position embeddings would not see that patches changed places."""
    model = victims.get("vit")(10, width=8).eval()
    images = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(model(images), model(images.roll(16, dims=-1)), atol=1e-6)


@pytest.mark.parametrize(
    "name, width, message",
    [
        ("densenet121", 5, "width is 5, but densenet121 takes positive multiples of 2"),
        ("vgg16", 0, "width is 0, but vgg16 takes a positive integer"),
        ("mobilenet_v2", -1, "width is -1, but mobilenet_v2 takes a positive integer"),
        ("vit", 0, "width is 0, but vit takes a positive integer"),
    ],
)
def test_a_width_that_a_network_cannot_take(name, width, message):
    with pytest.raises(ValueError, match=message):
        victims.get(name)(10, width=width)


def test_unknown_name():
    with pytest.raises(ValueError, match="victim 'resnet50' is unknown; accepted are resnet18, vgg16"):
        victims.get("resnet50")
