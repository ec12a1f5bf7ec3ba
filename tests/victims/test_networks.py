"""Every victim by name: what it maps, what it counts, what it refuses; and the changes made for small images."""

import pytest
import torch
import torchvision

from jcdp_diffusers import victims
from jcdp_diffusers.victims.networks import last_layer, resnet18


# At width 64 with 10 classes and 3 channels: the library's own network, less what small images do without.
PARAMETERS = {
    "resnet18": 11_173_962,
    "convnet94": 1_972_802,
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
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


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


@pytest.mark.parametrize("in_channels, num_classes", [(3, 10), (1, 37)])
@pytest.mark.parametrize("size", [32, 28])
def test_equals_torchvision_with_a_small_stem(in_channels, num_classes, size):
    reference = torchvision.models.resnet18(num_classes=num_classes)
    reference.conv1 = torch.nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    reference.maxpool = torch.nn.Identity()
    ours = resnet18(num_classes, in_channels=in_channels)
    reference.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    images = torch.rand(4, in_channels, size, size, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(images), reference.train(mode)(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size, stride, pooled", [(47, 1, False), (64, 2, False), (128, 2, True), (224, 2, True)])
def test_the_stem_suits_the_size_of_the_images(size, stride, pooled):
    """Stages see maps as large as those of small images; the network is torchvision's with that stem."""
    reference = torchvision.models.resnet18(num_classes=5)
    reference.conv1 = torch.nn.Conv2d(3, 64, 3, stride=stride, padding=1, bias=False)
    if not pooled:
        reference.maxpool = torch.nn.Identity()
    ours = victims.build("resnet18", 5, in_channels=3, width=64, image_size=size)
    ours.load_state_dict(reference.state_dict())
    images = torch.rand(2, 3, size, size)
    torch.testing.assert_close(ours.eval()(images), reference.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", victims.NAMES)
def test_every_network_takes_photographs(name):
    model = victims.build(name, 4, in_channels=3, width=4, image_size=128)
    assert model(torch.rand(2, 3, 128, 128)).shape == (2, 4)


@pytest.mark.parametrize("width", [1, 6, 16])
def test_width_scales_every_stage(width):
    model = resnet18(5, width=width)
    widths = [stage[-1].conv2.out_channels for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    assert widths == [width, 2 * width, 4 * width, 8 * width]
    assert model.features(torch.rand(2, 3, 32, 32)).shape == (2, 8 * width)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 5)


def test_last_features_are_4x4_and_averaged():
    model = resnet18(10, width=4).eval()
    seen = []
    model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = model.features(torch.rand(2, 3, 32, 32))
    assert seen[0].shape == (2, 32, 4, 4)
    torch.testing.assert_close(features, torch.nn.functional.adaptive_avg_pool2d(seen[0], 1).flatten(1))


def test_default_initialisation():
    """Kaiming uniform with a = sqrt(5), which is uniform in 1 / sqrt(fan in); batch normalisation starts at (1, 0)."""
    model = resnet18(10)
    weight = model.layer2[0].conv1.weight
    bound = 1 / (64 * 9) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound
    assert abs(weight.std() / (bound / 3**0.5) - 1) < 0.02
    assert torch.equal(model.layer4[1].bn2.weight, torch.ones(512))


def test_vgg16_is_torchvisions_apart_from_the_classifier():
    with torch.device("meta"):  # its classifier has 120 million weights
        reference = torchvision.models.vgg16_bn().features.eval()
    reference = reference.to_empty(device="cpu")
    ours = victims.get("vgg16")(10).eval()
    reference.load_state_dict(ours.body[0].state_dict())  # strict: the same names and shapes
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours(images), ours.head(reference(images).flatten(1)))


@pytest.mark.parametrize(
    "name, features, size",
    [("densenet121", lambda model: model.body[0], 4), ("mobilenet_v2", lambda model: model.body[0], 4)],
)
def test_small_images_end_as_4x4_features(name, features, size):
    model = victims.get(name)(10, width=8)
    assert features(model)(torch.rand(2, 3, 32, 32)).shape[2:] == (size, size)


def test_vit_positions_matter():
    """A transformer without position embeddings would not see that patches changed places."""
    model = victims.get("vit")(10, width=8).eval()
    images = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(model(images), model(images.roll(16, dims=-1)), atol=1e-6)


@pytest.mark.parametrize("name", victims.NAMES)
def test_images_of_any_size_are_taken_or_refused_in_a_sentence(name):
    network = victims.get(name)(10, width=8).eval()
    if hasattr(network, "whiten"):
        network.whiten(torch.rand(50, 3, 12, 12))
    accepted = 0
    for height, width in [(1, 1), (4, 8), (5, 5), (8, 8), (9, 9), (9, 13), (33, 20), (36, 20)]:
        try:
            victims.check_sides(name, height, width)
        except ValueError as error:
            assert repr(name) in str(error) and f"{height}x{width}" in str(error)
        else:
            accepted += 1
            assert network(torch.rand(2, 3, height, width)).shape == (2, 10)
    assert accepted >= 3


def test_vit_is_given_no_image_whose_last_row_it_would_not_see():
    network = victims.get("vit")(10, width=8).eval()
    for height, seen in ((32, True), (33, False)):
        images = torch.rand(1, 3, height, 32, requires_grad=True)
        network(images).sum().backward()
        assert bool(images.grad[:, :, -1].any()) is seen
    with pytest.raises(ValueError, match="victim is 'vit'.* 33x32 .* 4 pixels"):
        victims.check_sides("vit", 33, 32)


@pytest.mark.parametrize(
    "name, width, message",
    [
        ("densenet121", 5, "width is 5, .* multiple of 2 for densenet121"),
        ("resnet18", 0, "width is 0, .* resnet18"),
        ("vgg16", 0, "width is 0, .* vgg16"),
        ("mobilenet_v2", -1, "width is -1, .* mobilenet_v2"),
        ("vit", 0, "width is 0, .* vit"),
    ],
)
def test_a_width_that_a_network_cannot_take(name, width, message):
    with pytest.raises(ValueError, match=message):
        victims.get(name)(10, width=width)


def test_unknown_name():
    with pytest.raises(ValueError, match="victim is 'resnet50', .* resnet18, convnet94"):
        victims.get("resnet50")


@pytest.mark.parametrize("name", victims.NAMES)
def test_logits_are_the_head_of_the_features(name):
    model = victims.get(name)(7, width=8).eval()
    images = torch.rand(2, 3, 32, 32)
    features = model.features(images)
    assert features.shape == (2, model.num_features)
    torch.testing.assert_close(model(images) * (9 if name == "convnet94" else 1), last_layer(model)(features))


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("name", victims.NAMES)
def test_a_step_ends_no_process(name, size):
    """A faulty kernel would end this one by a signal."""
    model = victims.get(name)(4, width=8).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, size, size).to(memory_format=torch.channels_last)
    model(images).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
