"""Initial weights (section 5.1), on every model that the harness can build."""

import math

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from harness.models.cifar_resnet import SMALL_RESNET, CifarResNet
from harness.models.ghost_batch_norm import convert_batch_norms
from harness.models.torchvision_networks import RESNET, residual_blocks
from harness.recipe.initialization import initialize, initialize_last_norms

BLOCKS = {  # He et al. 2015, table 1 and section 4.2; ResNeXt and wide ones are as deep
    "resnet8": 3,
    "resnet20": 9,
    "resnet32": 15,
    "resnet56": 27,
    "resnet18": 2 + 2 + 2 + 2,
    "resnet34": 3 + 4 + 6 + 3,
    "resnet50": 3 + 4 + 6 + 3,
    "resnet101": 3 + 4 + 23 + 3,
    "resnet152": 3 + 8 + 36 + 3,
    "resnext50_32x4d": 16,
    "resnext101_32x8d": 33,
    "resnext101_64x4d": 33,
    "wide_resnet50_2": 16,
    "wide_resnet101_2": 33,
}


def bare(name):
    if name in ("resnet8", "resnet20", "resnet32", "resnet56"):
        return CifarResNet(int(name.removeprefix("resnet")), 10)
    return get_model(name, weights=None)


@pytest.fixture(scope="module")
def resnet50():
    model = bare("resnet50")
    initialize(model, seed=1)
    initialize_last_norms((block.last_norm for block in residual_blocks(model)), 0)
    return model


def test_every_model_is_in_the_table():
    assert sorted(BLOCKS) == sorted([*SMALL_RESNET.names, *RESNET.names])


@pytest.mark.parametrize("name", BLOCKS)
def test_the_last_batch_norm_of_every_block_of_every_model(name):
    with torch.device("meta"):  # which batch norms they are; their values are tested below
        model = bare(name)
    blocks = residual_blocks(model)
    assert len(blocks) == BLOCKS[name]
    modules = {module: name for name, module in model.named_modules()}
    bottleneck = (
        name not in ("resnet18", "resnet34") and BLOCKS[name] != 3 and model.fc.in_features > 512
    )
    last = "bn3" if bottleneck else "bn2"
    assert [modules[block.last_norm] for block in blocks] == [
        f"{modules[block.module]}.{last}" for block in blocks
    ]


def test_sixteen_of_sixteen_last_gammas_are_zero(resnet50):
    zero = [name for name, p in resnet50.named_parameters() if p.ndim == 1 and not p.any()]
    gammas = [name for name in zero if name.endswith("bn3.weight")]
    assert len(gammas) == 16
    # all else that is zero is a bias: 53 betas and the fc's
    assert len([name for name in zero if name.endswith("bias")]) == 54
    assert len(zero) == 16 + 54


def test_all_other_gammas_are_one(resnet50):
    norms = [m for m in resnet50.modules() if isinstance(m, nn.BatchNorm2d)]
    assert sum(bool((norm.weight == 1).all()) for norm in norms) == 53 - 16
    assert all(bool((norm.bias == 0).all()) for norm in norms)


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet8", 3)])
def test_basic_blocks_and_the_setting_of_gamma(name, blocks):
    model = bare(name)
    for gamma in (0, 1):  # table 2b
        norms = [block.last_norm for block in residual_blocks(model)]
        initialize_last_norms(norms, gamma)
        assert len(norms) == blocks
        assert all(bool((norm.weight == gamma).all()) for norm in norms)


def test_a_block_begins_as_the_identity():
    # section 5.1: with gamma 0 "the forward/backward signal initially propagates through the
    # identity shortcut"
    model = bare("resnet8").double()
    initialize_last_norms((block.last_norm for block in residual_blocks(model)), 0)
    x = torch.rand(4, 16, 8, 8, dtype=torch.float64)  # not negative: the last ReLU keeps it
    assert torch.equal(model.layer1(x), x)


def test_the_fc_has_standard_deviation_one_hundredth(resnet50):
    # 2048 * 1000 values: the standard error of the std is 0.01 / sqrt(2 * 2048000) = 5e-6
    assert resnet50.fc.weight.std().item() == pytest.approx(0.01, abs=2e-5)
    assert resnet50.fc.weight.mean().item() == pytest.approx(0.0, abs=3e-5)
    assert not resnet50.fc.bias.any()


@pytest.mark.parametrize(
    ("name", "fan_out"),
    [
        ("conv1", 64 * 7 * 7),
        ("layer4.0.conv2", 512 * 3 * 3),
        ("layer4.0.conv3", 2048),
        ("layer4.0.downsample.0", 2048),
    ],
)
def test_convolutions_by_fan_out(resnet50, name, fan_out):
    # He et al. 2015: variance 2 / fan_out
    weight = resnet50.get_submodule(name).weight
    error = 4 / math.sqrt(2 * weight.numel())  # four standard errors, relative
    assert weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=error)


def test_grouped_convolutions_by_torchvisions_fan_out():
    # torchvision's own initialization of a grouped 3x3 has out_channels * 9, not that / groups
    conv = nn.Conv2d(128, 128, 3, groups=32, bias=False)
    initialize(conv, seed=1)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (128 * 9)), rel=0.05)


def test_values_depend_on_seed_and_name_alone():
    alone = nn.ModuleDict({"b": nn.Linear(4, 3)})
    beside = nn.ModuleDict({"c": nn.Conv2d(3, 8, 3, bias=False), "b": nn.Linear(4, 3)})
    torch.manual_seed(7)  # the library's generator plays no part
    for model in (alone, beside):
        initialize(model, seed=1)
    assert torch.equal(alone["b"].weight, beside["b"].weight)
    initialize(beside, seed=2)
    assert not torch.equal(alone["b"].weight, beside["b"].weight)
    other_name = nn.ModuleDict({"d": nn.Linear(4, 3)})
    initialize(other_name, seed=1)
    assert not torch.equal(alone["b"].weight, other_name["d"].weight)


def test_float64_and_ghost_batch_norm_change_no_value():
    plain, double = bare("resnet8"), bare("resnet8").double()
    convert_batch_norms(double, worker_batch=4, channels_last=False)
    initialize(plain, seed=3)
    initialize(double, seed=3)
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight.double(), double.state_dict()[name].double()), name


def test_trained_statistics_are_reset():
    norm = nn.BatchNorm2d(2)
    norm(torch.rand(4, 2, 3, 3))
    initialize(norm, seed=1)
    assert norm.running_mean.tolist() == [0, 0] and norm.running_var.tolist() == [1, 1]
    assert norm.num_batches_tracked.item() == 0


def test_golden_values():
    # a stream of another library version would break resumed comparisons: 4 values of seed 1
    linear = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    initialize(linear, seed=1)
    golden = [-0.0080728848, -0.015828025, -0.015649697, -0.017229309]
    assert linear["fc"].weight.flatten().tolist() == pytest.approx(golden, rel=1e-5)


def test_a_module_without_a_rule_is_refused():
    with pytest.raises(TypeError, match=r"^1: section 5.1 has no rule for PReLU"):
        initialize(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.PReLU()), seed=1)
    with pytest.raises(TypeError, match="no rule"):
        initialize(nn.Conv2d(3, 4, 3, bias=True), seed=1)
