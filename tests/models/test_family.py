"""Networks beyond the ResNets: torchvision's others, and those of installed packages."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from harness.config.loading import load_config
from harness.deployment.evaluation import evaluate_trained
from harness.deployment.export import export_trained
from harness.distillation.teacher import load_teacher
from harness.errors import UserError
from harness.execution.trained_model import load_trained
from harness.models.ghost_batch_norm import RunningStatistics, convert_batch_norms
from harness.models.registry import build_model, build_without_weights, check_model, find_family
from harness.models.training_pass import try_training_pass
from harness.planning.plan import make_plan
from harness.planning.plan_text import render_plan
from harness.recipe.losses import training_loss
from harness.training.setup import train
from tests.models.test_build_model import config
from tests.packages import commands_of, install, install_page, package_of

REGNET = {"name": "regnet_y_400mf"}
VGG = {"name": "vgg11_bn", "options": {"dropout": 0}}
CONVNET = {"name": "convnet2", "options": {"width": 8}}


@pytest.fixture
def convnets(tmp_path, monkeypatch):
    install_page("networks.md", tmp_path / "site", monkeypatch)


def summed(network, images, labels, shares):
    """Gradient and batch norms' sums of a step whose ranks have these shares of the images."""
    network = copy.deepcopy(network).train()
    statistics = RunningStatistics(network)
    for x, y in zip(images.split(shares), labels.split(shares), strict=True):
        training_loss(network(x), y, len(images), 0.0).backward()
    gradients = torch.cat([p.grad.flatten() for p in network.parameters()])
    return gradients, torch.cat(statistics.sums)


@pytest.mark.parametrize(
    "model",
    [REGNET, pytest.param(VGG, marks=pytest.mark.soak), CONVNET],
    ids=lambda model: model["name"],
)
def test_any_shares_give_the_same_gradients(model, convnets):
    """2 workers of n = 4 images on 1 and on 2 ranks, summed as the ranks do."""
    settings = config(model, crop=32)
    check_model(settings)
    network = build_model(settings, channels_last=True).double()
    images = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8)
    alone = summed(network, images, labels, [8])
    assert alone[0].any()
    for ours, theirs in zip(summed(network, images, labels, [4, 4]), alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_network_keeps_its_own_initialization_drawn_from_the_seed():
    torch.manual_seed(1)
    first = build_model(config(REGNET)).state_dict()
    torch.manual_seed(2)  # neither plays the process's generator a part, nor does it move
    before = torch.get_rng_state()
    again = build_model(config(REGNET)).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    other_seed = build_model(config(REGNET, seed=2)).state_dict()
    assert not torch.equal(first["stem.0.weight"], other_seed["stem.0.weight"])
    # torchvision's RegNets: convolutions sqrt(2 / fan_out), fc weights 0.01
    assert first["stem.0.weight"].std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.1)
    assert first["fc.weight"].std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("alexnet", "classifier.0"),
        ("mobilenet_v2", "classifier.0"),
        ("convnext_tiny", "features.1.1.stochastic_depth"),  # the first block's probability is 0
    ],
)
def test_networks_that_draw_are_refused_by_the_modules_name(name, module):
    with pytest.raises(UserError) as refused:
        check_model(config({"name": name}, crop=64))
    assert f"model.name: {name}: {module} draws random numbers" in str(refused.value)
    assert "\n" not in str(refused.value) and "model.options" in str(refused.value)


def test_a_network_with_dropout_of_0_is_accepted():
    check_model(config({"name": "alexnet", "options": {"dropout": 0}}, crop=64))


def test_other_outputs_options_and_settings_are_refused():
    with pytest.raises(UserError, match="googlenet returns GoogLeNetOutputs in training instead"):
        check_model(config({"name": "googlenet", "options": {"init_weights": False}}, crop=64))
    with pytest.raises(UserError, match=r"resnet18 cannot be built with .*no_such"):
        build_model(config({"name": "resnet18", "options": {"no_such": 1}}))
    with pytest.raises(UserError, match=r"model\.last_gamma: regnet_y_400mf names no"):
        check_model(config({**REGNET, "last_gamma": 1}))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes.add_(1)
        return x


def test_what_else_breaks_the_one_curve_is_found():
    norm, unused = nn.BatchNorm2d(4), nn.Module()
    unused.register_parameter("weight", nn.Parameter(torch.zeros(1)))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), norm, Counting(), nn.Identity())
    network[5].unused = unused
    tried = try_training_pass(network, (2, 3, 8, 8))
    assert tried.output.shape == (2, 4, 6, 6)
    assert tried.faults == {
        "1": "is applied more than once",
        "4": "changes a buffer",
        "5.unused": "gets no gradient",
    }
    # the pass was of a copy
    assert not network[4].passes and not norm.num_batches_tracked and norm.weight.grad is None


@pytest.mark.parametrize("norm", ["nn.BatchNorm2d(8, affine=False)", "nn.SyncBatchNorm(8)"])
def test_another_batch_norm_is_refused(norm, tmp_path, monkeypatch):
    code = package_of("networks.md")["small_convnets.py"]
    code = code.replace("nn.BatchNorm2d(width)", norm)
    install(tmp_path, monkeypatch, "odd", code, "harness.models", "odd = odd:FAMILY")
    with pytest.raises(UserError, match=r"convnet2: 1 is a \w+BatchNorm|convnet2: 1 is a BatchN"):
        check_model(config(CONVNET))


def test_each_layer_has_the_momentum_it_was_built_with():
    # r <- (1 - momentum) r + momentum * mean over 2 workers: sums of 4 are means of 2
    network = nn.Sequential(nn.BatchNorm2d(1, momentum=0.1), nn.BatchNorm2d(1, momentum=0.25))
    convert_batch_norms(network, 4, channels_last=False)
    statistics = RunningStatistics(network)
    for norm in network:
        norm.sums.fill_(4.0)
    statistics.update(workers=2)
    assert [norm.running_mean.item() for norm in network] == pytest.approx([0.2, 0.5])
    assert [norm.running_var.item() for norm in network] == pytest.approx([1.1, 1.25])


def test_the_plan_says_which_rules_apply(convnets):
    paper = make_plan(config(CONVNET), 1)  # by section 5.1, as its family asks
    assert paper["initialization"].startswith("section 5.1")
    assert [check["ok"] for check in paper["checks"]] == [True] * 5
    text = render_plan(paper)
    assert "network      of the family 'small ConvNets'" in text
    assert "unchecked  last γ of residual blocks: the family names no blocks" in text
    own = render_plan(make_plan(config(REGNET), 1))
    assert "unchecked  initial values: the network's own, from (seed, model.name)" in own
    assert "fc weight std" not in own and "harness verify" in own
    assert "unchecked" not in render_plan(make_plan(config({"name": "resnet8"}), 1))


def test_an_unknown_option_of_a_package_and_a_near_name(convnets):
    with pytest.raises(UserError, match=r"convnet2 has no option depth"):
        build_model(config({"name": "convnet2", "options": {"depth": 3}}))
    with pytest.raises(UserError, match="did you mean 'convnet2'"):
        build_model(config({"name": "convnet22"}))


@pytest.mark.parametrize(
    ("code", "match"),
    [
        ("raise RuntimeError('no such library')", "broken:FAMILY cannot be imported: no such lib"),
        ("FAMILY = 3", "broken:FAMILY is a int instead of a ModelFamily"),
    ],
)
def test_a_package_that_cannot_be_used_is_one_line(code, match, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, "broken", code, "harness.models", "broken = broken:FAMILY")
    with pytest.raises(UserError, match=rf"^model\.name: {match}"):
        build_model(config({"name": "tiny"}))
    assert build_without_weights(config({"name": "resnet8"}))  # needs no package


def test_a_name_of_two_packages_is_refused(convnets, tmp_path, monkeypatch):
    code = package_of("networks.md")["small_convnets.py"]
    install(tmp_path / "b", monkeypatch, "twin", code, "harness.models", "twin = twin:FAMILY")
    with pytest.raises(UserError, match="'convnet2' is a network of small ConvNets and of small"):
        find_family("convnet2")


def test_a_network_of_a_package_is_trained_evaluated_exported_and_taken_as_teacher(
    convnets, small, tmp_path
):
    keys = ["model.name=convnet2", "model.options.width=16", "model.width=null"]
    trained_error = train(load_config(small(), keys), tmp_path / "run").error
    trained = load_trained(tmp_path / "run")
    assert evaluate_trained(trained)[0].error == pytest.approx(trained_error)
    export_trained(trained, tmp_path / "convnet.pt")
    teacher = [f"teacher={tmp_path}/convnet.pt", "teacher_model=convnet2", "precision=float32"]
    config = load_config(small(), [f"distill.{key}" for key in teacher])
    loaded = load_teacher(config, trained.class_names).network.state_dict()
    assert all(torch.equal(loaded[n], value) for n, value in trained.model.state_dict().items())


REGNET_VERIFIED = """verify configs/quickstart.yaml model.name=regnet_y_400mf --ranks 2 --steps 4
recipe.minibatch=64 recipe.worker_batch=8 recipe.reference_minibatch=8 run.micro_batch=8"""


@pytest.mark.soak
@pytest.mark.parametrize(
    ("page", "options"),
    [
        ("networks.md", commands_of("networks.md")[0]),
        ("optimizers.md", commands_of("optimizers.md")[0]),
        ("networks.md", REGNET_VERIFIED.split()),
    ],
)
def test_verify_passes_with_packages_that_pip_installed(page, options, digits, tmp_path):
    """The commands of the pages, as their reader runs them; and verify on a RegNet."""
    for name, text in package_of(page).items():
        (tmp_path / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "site", tmp_path], check=True)
    ended = subprocess.run(
        [sys.executable, "-m", "harness", *options, f"run.data_root={digits}"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
