"""The small ResNets of He et al. 2015, section 4.2."""

import pytest
import torch
from torch import nn

from harness.models.cifar_resnet import CifarResNet, Shortcut


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_resnet20_has_a_quarter_of_a_million_parameters():
    # stem 3*16*9 + 2*16 = 464
    # stage 1: 6 convolutions 16*16*9 = 13824, 6 norms 2*16 = 192
    # stage 2: 16*32*9 + 5 * 32*32*9 = 50688, 6 * 2*32 = 384
    # stage 3: 32*64*9 + 5 * 64*64*9 = 202752, 6 * 2*64 = 768
    # fc 64*10 + 10 = 650; in all 269722: table 6's 0.27 M
    assert parameters(CifarResNet(20, 10)) == 464 + 14016 + 51072 + 203520 + 650 == 269_722


@pytest.mark.parametrize(("depth", "millions"), [(32, 0.46), (56, 0.85)])
def test_the_deeper_ones_are_as_large_as_the_papers(depth, millions):
    assert parameters(CifarResNet(depth, 10)) / 1e6 == pytest.approx(millions, abs=0.01)  # table 6


@pytest.mark.parametrize("depth", [8, 20, 32, 56])
def test_depth_counts_convolutions_and_the_fc(depth):
    model = CifarResNet(depth, 10)
    weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(weighted) == depth


@pytest.mark.parametrize("size", [4, 16, 32])
def test_stages_halve_the_image_and_double_the_width(size):
    model = CifarResNet(8, 7, width=8)
    x = model.relu(model.bn1(model.conv1(torch.randn(2, 3, size, size))))
    shapes = [tuple(x.shape)] + [
        tuple((x := s(x)).shape) for s in (model.layer1, model.layer2, model.layer3)
    ]
    half, quarter = size // 2, size // 4
    assert shapes == [(2, 8, size, size)] * 2 + [(2, 16, half, half), (2, 32, quarter, quarter)]
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def test_the_shortcut_has_no_parameters():
    shortcut = Shortcut(new_channels=1, stride=2)
    x = torch.arange(9.0).view(1, 1, 3, 3)
    # rows and columns 0 and 2; the new channel is zero
    assert shortcut(x).tolist() == [[[[0, 2], [6, 8]], [[0, 0], [0, 0]]]]
    assert not list(shortcut.parameters())


def test_the_shortcut_keeps_channels_last():
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    assert Shortcut(4, 2)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("depth", [2, 9, 18])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match="6b"):
        CifarResNet(depth, 10)
