"""
The networks of victims: logits (B, num_classes) from images (B, C, H, W) in [0, 1].

Each network has `features(images)`, (B, num_features), which its last layer sees, and `num_features`. `lower_stages()`
are the modules of its lower half, which fine-tuning may leave as they are.

The ResNet-18 is the victim of almost every paper on unlearnable examples. The others ask whether a result holds for
networks that the poison was not made for: VGG, DenseNet and MobileNet from torchvision, the vision transformer from
transformers. They are made for images of 224x224, so each is changed where it would shrink small images to nothing;
the changes are named with each builder. Width 64 is the published network, and every other width scales its channels
in proportion.
"""

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """
    Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes.

    A shortcut of stride 2 takes every second row and column and then convolves with stride 1. The result has the same
    bits as a convolution of stride 2, whose backward pass for channels-last float32 writes beyond its memory in oneDNN
    where images have 64 pixels or more and the network is narrow.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        residual += self.downsample(x[:, :, :: self.stride, :: self.stride])
        return F.relu(residual, inplace=True)


class ResNet18(nn.Module):
    """
    ResNet-18 (He et al., CVPR 2016) with the stem that small images need, at any width.

    The stem is one 3x3 convolution of stride 1 without max-pooling, so that a 32x32 image is still 4x4 before the
    final average. Larger images need a larger stride: 2 makes of a 64x64 image what 1 makes of 32x32. At 4 there is a
    max-pooling as in the original. Parameters have torchvision's names. Weights start from PyTorch's default
    initialisation, as in the repositories of the poisons, but for contrastive poisoning's, whose convolutions start
    from Kaiming's normal one. With `width=64`, `in_channels=3` and 10 classes it has
    11,173,962 parameters.

    Args:
        num_classes (`int`): Number of logits.
        in_channels (`int`, defaults to 3): Channels of the images, 1 or 3 as a rule.
        width (`int`, defaults to 64): Channels of the first stage. The stages have 1, 2, 4 and 8 times as many.
        image_size (`int`, defaults to 32): Shorter side of the images, which decides the stem: stride 1 below 48
            pixels, 2 below 96, and 4 from there on.

    Raises:
        ValueError: If the width is no positive integer.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, width: int = 64, image_size: int = 32):
        super().__init__()
        _check_width("resnet18", width)
        self.num_features = 8 * width
        stride = 1 if image_size < 48 else 2
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if image_size >= 96 else nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width, 1))
        self.fc = nn.Linear(8 * width, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The averaged features (B, 8 * width) that the last layer sees."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        # The adaptive average pool to 1x1, written as a mean because its backward pass is deterministic on CUDA too.
        return x.mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(images))

    def lower_stages(self) -> list[nn.Module]:
        """Stem and the first two of four stages."""
        return [self.conv1, self.bn1, self.layer1, self.layer2]


class FeaturesAndHead(nn.Module):
    """
    A network of two parts.

    Args:
        body (`nn.Sequential`): From images (B, C, H, W) to features (B, num_features); its first part has the stages.
        head (`nn.Module`): From features to logits (B, num_classes).
        num_features (`int`): Size of the features.
        lower (`int`): How many modules of the body's first part are the lower stages.
    """

    def __init__(self, body: nn.Sequential, head: nn.Module, num_features: int, lower: int):
        super().__init__()
        self.body = body
        self.head = head
        self.num_features = num_features
        self.lower = lower

    def lower_stages(self) -> list[nn.Module]:
        """See [`FeaturesAndHead`]."""
        return list(self.body[0].children())[: self.lower]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def resnet18(num_classes: int, *, in_channels: int = 3, width: int = 64, image_size: int = 32) -> ResNet18:
    """[`ResNet18`], for 32x32 images unless `image_size` says otherwise."""
    return ResNet18(num_classes, in_channels=in_channels, width=width, image_size=image_size)


class ConvNet94(nn.Module):
    """
    The network of airbench94 (Jordan, 2024; KellerJordan/cifar10-airbench), which learns CIFAR-10 in minutes.

    A frozen 2x2 convolution whitens patches. Three groups of two 3x3 convolutions follow, each with a max-pooling,
    batch normalisation without scale, and GELU. The last maps are 3x3 for 32x32 images; features are their maxima,
    whatever the size. Until [`~ConvNet94.whiten`] is called, the first layer has random weights. With `width=64` and
    10 classes it has 1,972,802 parameters.

    Args:
        num_classes (`int`): Number of logits.
        in_channels (`int`, defaults to 3): Channels of the images, 1 or 3.
        width (`int`, defaults to 64): Channels of the first group; the others have 4 times as many.

    Raises:
        ValueError: If the width is no positive integer.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, width: int = 64):
        super().__init__()
        _check_width("convnet94", width)
        self.num_features = 4 * width
        mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]])  # of CIFAR-10
        if in_channels == 1:
            mean, std = mean.mean(dim=0, keepdim=True), std.mean(dim=0, keepdim=True)
        self.register_buffer("mean", mean.view(1, -1, 1, 1))
        self.register_buffer("std", std.view(1, -1, 1, 1))
        filters = 2 * in_channels * 4
        self.whitening = nn.Conv2d(in_channels, filters, 2)  # its bias starts from PyTorch's default, theirs at 0
        self.whitening.weight.requires_grad_(False)
        widths = (filters, width, 4 * width, 4 * width)
        self.groups = nn.ModuleList(ConvGroup(*pair) for pair in zip(widths, widths[1:]))
        # No bias: it is here, at 0, for what replaces this layer.
        self.head = nn.Linear(4 * width, num_classes)
        nn.init.zeros_(self.head.bias).requires_grad_(False)

    @torch.no_grad()
    def whiten(self, images: torch.Tensor) -> None:
        """
        Makes the first layer whiten 2x2 patches: filters are their principal directions at a variance of 1, and the
        negatives of those.

        Args:
            images (`torch.Tensor`): uint8 (N, C, H, W), or float in [0, 1]; the first 5,000 are looked at.
        """
        scale = 1 / 255 if images.dtype == torch.uint8 else 1
        products, patches_seen = 0, 0
        for part in images[:5000].split(250):  # all patches at once would take gigabytes
            part = (part.to(self.mean.device, torch.float32) * scale - self.mean) / self.std
            patches = F.unfold(part, 2).transpose(1, 2).flatten(0, 1).double().cpu()
            products = products + patches.T @ patches
            patches_seen += len(patches)
        moments = products / patches_seen  # not about the mean, as in the authors' program
        variances, directions = torch.linalg.eigh(moments)
        filters = (directions / (variances + 5e-4).sqrt()).T.reshape(len(variances), -1, 2, 2)
        self.whitening.weight.copy_(torch.cat([filters, -filters]))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """The largest values (B, 4 * width) of the last maps."""
        x = F.gelu(self.whitening((images - self.mean) / self.std))
        for group in self.groups:
            x = group(x)
        return x.amax(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images)) / 9

    def lower_stages(self) -> list[nn.Module]:
        """The whitening and the first of three groups."""
        return [self.whitening, self.groups[0]]


class ConvGroup(nn.Module):
    """Two 3x3 convolutions with batch normalisation without scale and GELU; the first halves height and width."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        # The authors' eps is 1e-12. With it, a channel that is constant but for rounding overflows in training.
        self.bn1, self.bn2 = (nn.BatchNorm2d(out_channels, eps=1e-8, momentum=0.4) for _ in range(2))
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            nn.init.dirac_(conv.weight.data[: conv.in_channels])  # as many filters as there are inputs pass them on
            norm.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.bn2(self.conv2(x)))


convnet94 = ConvNet94  # its attributes tell `train_victim` what it needs


def vgg16(num_classes: int, *, in_channels: int = 3, width: int = 64) -> nn.Module:
    """
    VGG-16 with batch normalisation (Simonyan and Zisserman, ICLR 2015).

    As usual for small images, one linear layer takes the place of the three that expect 7x7 features, and the five
    poolings keep a last odd row or column, so that images smaller than 32x32 pass too.
    """
    from torchvision.models.vgg import make_layers

    _check_width("vgg16", width)
    stages = [[1, 1], [2, 2], [4, 4, 4], [8, 8, 8], [8, 8, 8]]
    layers = make_layers([item for stage in stages for item in (*(width * n for n in stage), "M")], batch_norm=True)
    layers[0] = nn.Conv2d(in_channels, width, 3, padding=1)
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    body = nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    lower = 14  # up to the second pooling
    return FeaturesAndHead(body, nn.Linear(8 * width, num_classes), 8 * width, lower)


def densenet121(num_classes: int, *, in_channels: int = 3, width: int = 64) -> nn.Module:
    """
    DenseNet-121 (Huang et al., CVPR 2017), whose growth rate is half the width.

    The stem is a 3x3 convolution of stride 1 without pooling instead of 7x7 with stride 2 and pooling.
    """
    from torchvision.models import DenseNet

    _check_width("densenet121", width, multiple=2)
    model = DenseNet(growth_rate=width // 2, num_init_features=width, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.features.conv0.weight)
    model.features.pool0 = nn.Identity()
    body = nn.Sequential(model.features, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    lower = list(model.features._modules).index("transition2") + 1  # the first two of four dense blocks
    return FeaturesAndHead(body, model.classifier, model.classifier.in_features, lower)


def mobilenet_v2(num_classes: int, *, in_channels: int = 3, width: int = 64) -> nn.Module:
    """
    MobileNetV2 (Sandler et al., CVPR 2018), dropout of 0.2 before the last layer included.

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
    body = nn.Sequential(model.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    lower = 7  # the stem and the blocks of the first three stages
    return FeaturesAndHead(body, model.classifier, model.last_channel, lower)


def vit(num_classes: int, *, in_channels: int = 3, width: int = 64) -> nn.Module:
    """
    The tiny vision transformer (ViT-Ti; Touvron et al., ICML 2021): 12 layers, 3 heads of `width` channels each.

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
    return ViT(config)


class ViT(nn.Module):
    """Images to logits, around a model of transformers. Its features are the class token after the last layer."""

    def __init__(self, config):
        from transformers import ViTForImageClassification

        super().__init__()
        self.classifier = ViTForImageClassification(config)
        self.num_features = config.hidden_size

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier.vit(images, interpolate_pos_encoding=True).last_hidden_state[:, 0]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier.classifier(self.features(images))

    def lower_stages(self) -> list[nn.Module]:
        """The embeddings and the first half of the layers."""
        from transformers.models.vit.modeling_vit import ViTLayer

        layers = [module for module in self.classifier.modules() if isinstance(module, ViTLayer)]
        return [self.classifier.vit.embeddings, *layers[: len(layers) // 2]]


def last_layer(network: nn.Module) -> nn.Linear:
    """The layer of a network that makes logits (B, num_classes) of features (B, num_features)."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1]


def _check_width(name: str, width: int, multiple: int = 1) -> None:
    if width < 1 or width % multiple:
        accepted = "a positive integer" if multiple == 1 else f"a positive multiple of {multiple}"
        raise ValueError(f"width is {width}, but must be {accepted} for {name}.")
