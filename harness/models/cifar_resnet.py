"""ResNet-8/20/32/56 for small images (He et al. 2015, arXiv 1512.03385, section 4.2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from harness.models.family import ModelFamily, Option
from harness.models.torchvision_networks import residual_blocks
from harness.recipe.initialization import initialize

DEPTHS = {"resnet8": 8, "resnet20": 20, "resnet32": 32, "resnet56": 56}


class Shortcut(nn.Module):
    """The shortcut "A" of section 3.3: every `stride`-th pixel, and zeros for the new channels."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(nn.Module):
    """A 3x3 stem and three stages of b basic blocks, which are w, 2w and 4w channels wide.

    Images (B, 3, H, W) may have any size from 4x4; the second and third stage halve it. Raises
    ValueError for a depth other than 6b + 2.
    """

    def __init__(self, depth: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6b + 2")
        self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    shortcut = Shortcut(out_channels - in_channels, stride) if stride > 1 else None
    first = BasicBlock(in_channels, out_channels, stride, shortcut)
    return nn.Sequential(
        first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1))
    )


def build(name: str, classes: int, options: Mapping[str, Option]) -> nn.Module:
    """Build a small ResNet; `width` is its only option."""
    return CifarResNet(DEPTHS[name], classes, **options)  # type: ignore[arg-type]


SMALL_RESNET = ModelFamily("ResNets for small images", DEPTHS, build, initialize, residual_blocks)
