"""Forward passes of ResNets with batch norm, addition and ReLU as one operation of the norm.

Each class only replaces `forward` of its base: parameters and their names remain torchvision's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from harness.models.cifar_resnet import CifarResNet
from harness.models.ghost_batch_norm import GhostBatchNorm2d, add_relu


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Return relu(norm(x) + residual), which a ghost batch norm may compute as one operation."""
    if isinstance(norm, GhostBatchNorm2d):
        return norm(x, residual, relu=True)
    return add_relu(norm(x), residual, relu=True)


class FusedBasicBlock(BasicBlock):
    """torchvision's block of two 3x3 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        out = self.conv2(out)
        identity = x if self.downsample is None else self.downsample(x)
        return norm_relu(self.bn2, out, identity)


class FusedBottleneck(Bottleneck):
    """torchvision's block of 1x1, 3x3 and 1x1 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        out = norm_relu(self.bn1, self.conv1(x))
        out = norm_relu(self.bn2, self.conv2(out))
        out = self.conv3(out)
        identity = x if self.downsample is None else self.downsample(x)
        return norm_relu(self.bn3, out, identity)


class FusedResNet(ResNet):
    """torchvision's ResNet with a fused stem."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


class FusedCifarResNet(CifarResNet):
    """A ResNet for small images with a fused stem."""

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


def fuse_blocks(network: nn.Module) -> None:
    """Give the network and its residual blocks the forward passes of this module, in place."""
    for module in network.modules():
        module.__class__ = FUSED.get(type(module), type(module))
