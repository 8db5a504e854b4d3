"""Precise statistics: against PyTorch's own average, on several ranks, and without a trace."""

import copy
import json
import shutil
from contextlib import closing

import pytest
import torch
import yaml
from torch import nn

from harness import load_config
from harness.commands.command_line import main
from harness.data.batch_plan import BatchPlan
from harness.data.dataset import open_dataset
from harness.data.loaders.choice import open_loader
from harness.errors import UserError
from harness.execution.preprocess import Preprocess
from harness.execution.recalibration import recalibrated_statistics
from harness.models.ghost_batch_norm import add_relu, ghost_batch_norms
from harness.models.registry import build_model
from harness.runs.checkpoint import list_checkpoints, load_checkpoint
from harness.runs.logging.jsonl import read_log
from harness.runs.run_folder import RunFolder
from harness.training.setup import train
from tests.conftest import SMALL, harness

# five workers: an odd share of two ranks, and the last micro-batch of two is smaller
KEYS = ["run.precision=float64", "run.recalibrate_images=160", "run.micro_batch=64"]


def plan_of(config, rank=0, world_size=1, channels_last=False):
    sources = open_dataset(config)
    return BatchPlan(config, *sources, rank, world_size, config.run.micro_batch, channels_last)


def own_average(network, config, batches):
    """PyTorch's batch norm without momentum averages its batches, here one of each worker."""
    for parent in list(network.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                plain = nn.BatchNorm2d(norm.num_features, momentum=None).double()
                plain.weight, plain.bias = norm.weight, norm.bias
                parent.add_module(name, PlainNorm(plain))
    preprocess = Preprocess(config, torch.device("cpu"))
    for batch in batches:
        workers = len(batch.images) // 32
        for worker in range(workers):  # image i of worker w is at i * m + w
            network.train()(preprocess(batch.images[worker::workers]))
    norms = [module.norm for module in network.modules() if isinstance(module, PlainNorm)]
    return [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]


class PlainNorm(nn.Module):
    """As blocks call a ghost batch norm: with what to add, and whether to rectify."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, residual=None, relu=False):
        return add_relu(self.norm(x), residual, relu)


def test_they_are_the_average_of_pytorchs_batch_norm(small):
    config = load_config(small(), KEYS)
    network, preprocess = build_model(config).double(), Preprocess(config, torch.device("cpu"))
    layers = ghost_batch_norms(network)
    for layer in layers:
        nn.init.uniform_(layer.weight, 0.5, 1.5)  # the last γ of a block starts at 0
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with closing(open_loader(config, plan_of(config), "memory", 0, False)) as loader:
        batches = list(loader.recalibrate())
    assert [len(batch.images) for batch in batches] == [64, 64, 32]
    expected = own_average(copy.deepcopy(network), config, batches)
    with recalibrated_statistics(config, network, iter(batches), preprocess):
        found = [b.clone() for layer in layers for b in (layer.running_mean, layer.running_var)]
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-14)
    # and nothing of it is left
    assert network.training and not any(layer.sums.any() for layer in layers)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_ranks_share_the_first_images_of_the_first_epoch(small, world_size, channels_last):
    config = load_config(small(), [*KEYS, "recipe.minibatch=224"])  # k = 7
    plans = [plan_of(config, rank, world_size, channels_last) for rank in range(world_size)]
    ids = [spec.ids for plan in plans for spec in plan.recalibration()]
    assert sorted(i for part in ids for i in part) == sorted(plans[0].step_ids(0)[:160])
    # the windows are those of training
    windows = {}
    for spec in plan_of(config).training(0):
        rows = zip(spec.ids.tolist(), spec.top, spec.left, spec.height, spec.width, strict=True)
        windows |= {image: window for image, *window in rows if image not in windows}
    for plan in plans:
        for spec in plan.recalibration():
            rows = zip(spec.ids.tolist(), spec.top, spec.left, spec.height, spec.width, strict=True)
            assert all(windows[image] == window for image, *window in rows)


@pytest.mark.parametrize("name", ["memory", "reference", "dali"])
def test_loaders_give_the_images_while_training_continues(small, name):
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    config = load_config(small(), KEYS)
    plan = plan_of(config)
    with closing(open_loader(config, plan, name, 1, False)) as loader:
        training = loader.train(0)
        first = next(training)
        for _ in range(2):
            batches = list(loader.recalibrate())
            ids = torch.cat([batch.ids for batch in batches]).tolist()
            assert sorted(ids) == sorted(plan.step_ids(0)[:160])
            assert sum(len(batch.ids) for batch in loader.evaluate()) == 360
        # the crops are those of the first step
        at = (batches[0].ids[0] == first.ids).nonzero().flatten()
        assert len(at) == 1 and torch.equal(batches[0].images[0], first.images[at[0]])
        assert len(list(training)) == 15 * 4 - 1


def final(run):
    return load_checkpoint(list_checkpoints(run / "checkpoints")[0])["model"]


def evaluations(run):
    return [line for line in read_log(run / "log.jsonl") if line["event"] == "evaluation"]


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory):
    """The same run without and with recalibration, of LARS with polynomial decay in float64."""
    folder, mapping = tmp_path_factory.mktemp("recalibrated"), copy.deepcopy(SMALL)
    mapping["run"]["data_root"] = str(digits)
    del mapping["recipe"]["milestones"]
    mapping["recipe"] |= {"minibatch": 64, "worker_batch": 16, "decay": "polynomial"}
    mapping["recipe"] |= {"optimizer": "lars", "trust_coefficient": 0.01, "reference_lr": 0.5}
    (folder / "config.yaml").write_text(yaml.safe_dump(mapping))
    for name, images in {"plain": 0, "recalibrated": 80}.items():
        keys = ["run.precision=float64", "run.micro_batch=32", f"run.recalibrate_images={images}"]
        train(load_config(folder / "config.yaml", keys), folder / name)
    return folder


def test_training_is_the_same_bit_for_bit(runs):
    plain, recalibrated = final(runs / "plain"), final(runs / "recalibrated")
    assert all(torch.equal(value, recalibrated[name]) for name, value in plain.items())
    plain, recalibrated = evaluations(runs / "plain"), evaluations(runs / "recalibrated")
    assert all(a["loss"] != b["loss"] for a, b in zip(plain, recalibrated, strict=True))
    assert {line.get("recalibrate_images") for line in plain} == {None}
    assert {line["recalibrate_images"] for line in recalibrated} == {80}


def test_eval_measures_what_the_run_measured(runs, capsys):
    last = {name: evaluations(runs / name)[-1] for name in ("plain", "recalibrated")}
    for run, recalibrate, expected in (
        ("recalibrated", [], "recalibrated"),
        ("recalibrated", ["--recalibrate", "0"], "plain"),
        ("plain", ["--recalibrate", "80"], "recalibrated"),
    ):
        assert main(["eval", str(runs / run), "--json", *recalibrate]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["correct"] == last[expected]["correct"]
        assert result["recalibrate_images"] == (80 if expected == "recalibrated" else 0)
    assert main(["eval", str(runs / "plain"), "--recalibrate", "80"]) == 0
    assert "running statistics from 80 training images" in capsys.readouterr().out


def test_two_ranks_measure_and_train_the_same(runs):
    """Of the five workers one rank has two, the other three; of the minibatch's four both two."""
    keys = ["run.precision=float64", "run.micro_batch=16", "run.recalibrate_images=80"]
    out = runs / "two ranks"
    ended = harness("train", runs / "config.yaml", *keys, "--out", out, ranks=2)
    assert ended.returncode == 0, ended.stderr
    one, two = final(runs / "recalibrated"), final(out)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-9, atol=1e-11)
    for line, other in zip(evaluations(runs / "recalibrated"), evaluations(out), strict=True):
        assert other["correct"] == line["correct"]
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-9)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (1440, "run.recalibrate_images: 1440 is more than the 1437 training images; lower it"),
        (100, "run.recalibrate_images: 100 is not a multiple of recipe.worker_batch 16; take 96"),
        (-16, "run.recalibrate_images: expected at least 0, found -16"),
    ],
)
def test_impossible_numbers_are_refused_in_one_line(runs, images, message, capsys):
    assert main(["eval", str(runs / "plain"), "--recalibrate", str(images)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    keys = ["run.loader=memory", f"run.recalibrate_images={images}"]
    assert main(["train", str(runs / "config.yaml"), *keys, "--out", str(runs / "no")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not (runs / "no").exists()


def test_eval_needs_the_training_images_only_to_recalibrate(runs, own_digits, capsys):
    shutil.rmtree(own_digits / "train" / "3")
    words = ["eval", str(runs / "plain"), f"run.data_root={own_digits}"]
    assert main([*words, "--recalibrate", "80"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "images, but data.train_images is 1437" in line
    assert main(words) == 0


def test_a_resume_changes_it_only_where_the_command_line_says_so(runs, tmp_path):
    run = shutil.copytree(runs / "plain", tmp_path / "run")
    stored = load_config(run / "config.yaml")
    changed = load_config(run / "config.yaml", ["run.recalibrate_images=80"])
    with pytest.raises(UserError, match="changes the validation errors; type run"):
        RunFolder(run).check(changed, True, set())
    assert RunFolder(run).check(changed, True, {"run.recalibrate_images"})
    assert RunFolder(run).check(stored, True, set())
