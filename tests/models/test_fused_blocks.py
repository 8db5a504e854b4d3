"""The fused forward passes against torchvision's own."""

import copy

import pytest
import torch
from torchvision import models as torchvision_models

from harness.models.cifar_resnet import CifarResNet
from harness.models.fused_blocks import FUSED, fuse_blocks
from harness.models.ghost_batch_norm import GhostBatchNorm2d, convert_batch_norms

MODELS = {
    "resnet8": lambda: CifarResNet(8, 10, width=4),
    "resnet18": lambda: torchvision_models.resnet18(num_classes=10),
    "resnet50": lambda: torchvision_models.resnet50(num_classes=10),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_the_same_bits_as_the_own_forward(name, channels_last, training):
    torch.manual_seed(0)
    own = MODELS[name]().train(training)
    convert_batch_norms(own, worker_batch=2, channels_last=channels_last)
    fused = copy.deepcopy(own)
    fuse_blocks(fused)
    assert {type(m) for m in own.modules()} & FUSED.keys()
    assert not {type(m) for m in fused.modules()} & FUSED.keys()
    assert list(fused.state_dict()) == list(own.state_dict())
    x = torch.randn(4, 3, 32, 32)
    outputs = [model(x) for model in (own, fused)]
    assert torch.equal(*outputs)
    for y in outputs:
        y.logsumexp(1).sum().backward()
    for a, b in zip(own.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_every_addition_and_relu_of_a_resnet50_reaches_a_norm(monkeypatch):
    # 1 stem + 16 blocks of 3 norms have a ReLU; the last of each block also adds; the 4
    # downsampling norms have neither
    model = MODELS["resnet50"]()
    convert_batch_norms(model, worker_batch=2, channels_last=False)
    fuse_blocks(model)
    asked = []
    forward = GhostBatchNorm2d.forward

    def counted(self, x, residual=None, relu=False):
        asked.append((residual is not None, relu))
        return forward(self, x, residual, relu)

    monkeypatch.setattr(GhostBatchNorm2d, "forward", counted)
    model(torch.randn(2, 3, 32, 32))
    counts = [asked.count(pair) for pair in [(False, True), (True, True), (False, False)]]
    assert counts == [1 + 16 * 2, 16, 4] and len(asked) == 53


def test_another_norm_is_rectified_too():
    # such as a benchmark's stock batch norm in the same model
    torch.manual_seed(0)
    own = MODELS["resnet8"]()
    fused = copy.deepcopy(own)
    fuse_blocks(fused)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(own(x), fused(x))
