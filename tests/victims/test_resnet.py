"""The ResNet-18 for small images against torchvision's, with its stem replaced."""

import pytest
import torch
import torchvision

from jcdp_diffusers.victims.networks.resnet import resnet18


def parameter_count(model):
    return sum(parameter.numel() for parameter in model.parameters())


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


def test_parameter_count_of_the_papers():
    assert parameter_count(resnet18(10)) == 11_173_962


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


def test_width_is_positive():
    with pytest.raises(ValueError, match="width is 0, but resnet18 takes a positive integer"):
        resnet18(10, width=0)
