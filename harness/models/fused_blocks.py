"""The models' forward passes with batch norm, addition and ReLU as one operation of the norm.

Each class is its base with another `forward`: parameters and their names stay torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from harness.models.cifar_resnet import CifarResNet
from harness.models.ghost_batch_norm import GhostBatchNorm2d, add_relu


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual): left to a ghost batch norm, as it may fuse them."""
    if isinstance(norm, GhostBatchNorm2d):
        return norm(x, residual, relu=True)
    return add_relu(norm(x), residual, relu=True)


class FusedBasicBlock(BasicBlock):
    """torchvision's, two 3x3 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        out = self.conv2(out)
        identity = x if self.downsample is None else self.downsample(x)
        return norm_relu(self.bn2, out, identity)


class FusedBottleneck(Bottleneck):
    """torchvision's, 1x1, 3x3 and 1x1 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        out = norm_relu(self.bn2, self.conv2(out))
        out = self.conv3(out)
        identity = x if self.downsample is None else self.downsample(x)
        return norm_relu(self.bn3, out, identity)


class FusedResNet(ResNet):
    """torchvision's, with its stem fused too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class FusedCifarResNet(CifarResNet):
    """Ours for small images, with its stem fused too."""

    def forward(self, x: Tensor) -> Tensor:
        x = norm_relu(self.bn1, self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.avgpool(x).flatten(1))


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    ResNet: FusedResNet,
    CifarResNet: FusedCifarResNet,
}


def fuse_blocks(model: nn.Module) -> None:
    """Gives the model and its residual blocks the forward passes of this module, in place."""
    for module in model.modules():
        module.__class__ = FUSED.get(type(module), type(module))
