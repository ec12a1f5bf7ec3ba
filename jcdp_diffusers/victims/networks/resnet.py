"""The ResNet-18 for 32x32 images: the victim of almost every paper on unlearnable examples.

It is He et al.'s network (CVPR 2016) with the stem that small images need: one 3x3 convolution of stride 1 and no
max-pooling, so that a 32x32 image is still 4x4 before the final average. Parameters bear torchvision's names.
"""

import torch
from torch import nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = F.relu(self.bn1(self.conv1(x)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        residual += self.downsample(x)
        return F.relu(residual, inplace=True)


class ResNet18(nn.Module):
    """ResNet-18 for small images, at any width.

    Weights start from PyTorch's default initialisation, as in the repositories of the poisons. With `width=64`,
    `in_channels=3` and 10 classes it has 11,173,962 parameters.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images, 1 or 3 as a rule.
        width: channels of the first stage; the stages have 1, 2, 4 and 8 times as many.
    """

    def __init__(self, num_classes: int, *, in_channels: int = 3, width: int = 64):
        super().__init__()
        if width < 1:
            raise ValueError(f"width is {width}, but resnet18 takes a positive integer.")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1), BasicBlock(width, width, 1))
        self.layer2 = nn.Sequential(BasicBlock(width, 2 * width, 2), BasicBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(BasicBlock(2 * width, 4 * width, 2), BasicBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(BasicBlock(4 * width, 8 * width, 2), BasicBlock(8 * width, 8 * width, 1))
        self.fc = nn.Linear(8 * width, num_classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images (B, C, H, W) in [0, 1] to the averaged features (B, 8 * width) that the last layer sees."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        # The adaptive average pool to 1x1, written as a mean because its backward pass is deterministic on CUDA too.
        return x.mean(dim=(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(images))


def resnet18(num_classes: int, *, in_channels: int = 3, width: int = 64) -> ResNet18:
    """Builds the `ResNet18` for 32x32 images; see there."""
    return ResNet18(num_classes, in_channels=in_channels, width=width)
