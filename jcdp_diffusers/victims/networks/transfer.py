"""Transfer victims: does a result hold for networks that the poison was not made for?

VGG, DenseNet and MobileNet come from torchvision, the vision transformer from transformers. They are made for images
of 224x224, so each is changed where it would shrink small images to nothing; the changes are named with each builder.
Width 64 is the published network, and every other width scales its channels in proportion.
"""

import torch
from torch import nn


def vgg16(num_classes: int, *, in_channels: int = 3, width: int = 64) -> nn.Module:
    """VGG-16 with batch normalisation (Simonyan and Zisserman, ICLR 2015).

    As usual for small images, one linear layer takes the place of the three that expect 7x7 features, and the five
    poolings keep a last odd row or column, so that images smaller than 32x32 pass too.
    """
    from torchvision.models.vgg import make_layers

    _check_width("vgg16", width)
    stages = [[1, 1], [2, 2], [4, 4, 4], [8, 8, 8], [8, 8, 8]]
    features = make_layers([item for stage in stages for item in (*(width * n for n in stage), "M")], batch_norm=True)
    features[0] = nn.Conv2d(in_channels, width, 3, padding=1)
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, num_classes))


def densenet121(num_classes: int, *, in_channels: int = 3, width: int = 64) -> nn.Module:
    """DenseNet-121 (Huang et al., CVPR 2017), whose growth rate is half the width.

    The stem is a 3x3 convolution of stride 1 without pooling instead of 7x7 with stride 2 and pooling.
    """
    from torchvision.models import DenseNet

    _check_width("densenet121", width, multiple=2)
    model = DenseNet(growth_rate=width // 2, num_init_features=width, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    model.features.pool0 = nn.Identity()
    return model


def mobilenet_v2(num_classes: int, *, in_channels: int = 3, width: int = 64) -> nn.Module:
    """MobileNetV2 (Sandler et al., CVPR 2018), dropout of 0.2 before the last layer included.

    The stem and the second stage have stride 1 instead of 2, so that 32x32 images end as 4x4 features. Channels are
    rounded to multiples of 8, at least 8, by the network's own rule.
    """
    from torchvision.models import MobileNetV2

    _check_width("mobilenet_v2", width)
    stages = [  # expansion, channels, blocks, stride
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    model = MobileNetV2(num_classes, width_mult=width / 64, inverted_residual_setting=stages)
    stem = nn.Conv2d(in_channels, model.features[0][0].out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    model.features[0][0] = stem
    return model


def vit(num_classes: int, *, in_channels: int = 3, width: int = 64) -> nn.Module:
    """The tiny vision transformer (ViT-Ti; Touvron et al., ICML 2021): 12 layers, 3 heads of `width` channels each.

    Patches are 4x4 instead of 16x16; position embeddings are made for 32x32 images and interpolated for others.
    """
    from transformers import ViTConfig

    _check_width("vit", width)
    config = ViTConfig(
        image_size=32,
        patch_size=4,
        num_channels=in_channels,
        hidden_size=3 * width,
        num_attention_heads=3,
        num_hidden_layers=12,
        intermediate_size=12 * width,
        num_labels=num_classes,
    )
    return _ViT(config)


class _ViT(nn.Module):
    """Images to logits, around a model of transformers, which returns more than logits."""

    def __init__(self, config):
        from transformers import ViTForImageClassification

        super().__init__()
        self.classifier = ViTForImageClassification(config)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(pixel_values=images, interpolate_pos_encoding=True).logits


def _check_width(name: str, width: int, multiple: int = 1) -> None:
    if width < 1 or width % multiple:
        accepted = "a positive integer" if multiple == 1 else f"positive multiples of {multiple}"
        raise ValueError(f"width is {width}, but {name} takes {accepted}.")
