"""Any config: what is accepted can be planned and trained, what is refused is refused alike.

The examples are the same each time. `EXPLORE=100 pytest tests/test_any_config.py` tries a hundred
times as many, others each time.
"""

import contextlib
import io
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import launch.__main__
from harness import build_model
from harness.commands import command_line as cli
from harness.config.loading import config_from_mapping
from harness.config.schema import (
    Config,
    DataConfig,
    DistillConfig,
    ModelConfig,
    RecipeConfig,
    RunConfig,
)
from harness.errors import UserError
from harness.planning.plan import make_plan
from harness.planning.plan_text import render_plan
from harness.recipe.schedule import lr_at
from harness.runs.logging.jsonl import read_log
from harness.training.setup import train
from tests.launch.test_submit import CLUSTER

EXPLORE = int(os.environ.get("EXPLORE", "1"))


def explored(examples: int) -> settings:
    # a fixture that only makes a folder may serve all examples
    harmless = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=examples * EXPLORE,
        derandomize=EXPLORE == 1,
        deadline=None,
        database=None,
        suppress_health_check=harmless,
    )


TRAIN, UNLABELLED, VAL = 12, 3, 4  # images of `few`


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 12 training, 3 unlabelled and 4 validation images of 2 classes, and a teacher."""
    folder = tmp_path_factory.mktemp("few")
    noise = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for number in range(count):
            path = folder / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 256, (8, 6, 3), np.uint8)).save(path)
    (folder / "unlabelled").mkdir()
    for number in range(UNLABELLED):
        path = folder / "unlabelled" / f"{number}.png"
        Image.fromarray(noise.integers(0, 256, (8, 6, 3), np.uint8)).save(path)
    teacher = build_model(config_from_mapping(mapping(), "a test"))
    torch.save(teacher.state_dict(), folder / "teacher.pt")
    return folder


def mapping(**sections: dict) -> dict:
    """A config's, of sections added to what there has to be."""
    base: dict[str, dict] = {
        "expect": {"error": 50.0, "source": "a test"},
        "data": {"train_images": TRAIN, "val_images": VAL, "classes": 2},
        "model": {"name": "resnet8"},
        "recipe": {"minibatch": 4, "worker_batch": 2, "epochs": 90},
        "run": {"device": "cpu", "loader": "memory"},
    }
    return base | {name: base.get(name, {}) | keys for name, keys in sections.items()}


def keys(required: dict, **optional: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries(required, optional=optional)


def counts(largest: int) -> st.SearchStrategy[int]:
    return st.integers(1, largest)


@st.composite
def recipes(draw: st.DrawFn, largest_minibatch: int, largest_epochs: int) -> dict:
    n = draw(counts(min(largest_minibatch, 4)))
    recipe = {"worker_batch": n, "minibatch": n * draw(counts(largest_minibatch // n))}
    epochs = recipe["epochs"] = draw(counts(largest_epochs))
    recipe["decay"] = draw(st.sampled_from(["steps", "cosine", "polynomial"]))
    if recipe["decay"] == "polynomial":
        recipe["decay_power"] = draw(st.sampled_from([1e-9, 1.0, 2.0, 1e9]))
    if recipe["decay"] == "steps":
        later = st.integers(1, max(epochs - 1, 1))
        recipe["milestones"] = sorted(draw(st.sets(later, max_size=3))) if epochs > 1 else []
        recipe["decay_factor"] = draw(st.sampled_from([1e-300, 1e-9, 0.1, 1.0]))
    recipe["warmup"] = draw(st.sampled_from(["gradual", "constant", "none"]))
    if recipe["warmup"] != "none":
        recipe["warmup_epochs"] = draw(counts(epochs))
    recipe["scaling"] = draw(st.sampled_from(["linear", "sqrt", "none"]))
    recipe["reference_minibatch"] = draw(counts(2 * largest_minibatch))
    recipe["momentum"] = draw(st.sampled_from([0.5, 0.9]))
    recipe["optimizer"] = draw(st.sampled_from(["sgd", "lars"]))
    if recipe["optimizer"] == "sgd":
        recipe["nesterov"] = draw(st.booleans())
    else:
        recipe["trust_coefficient"] = draw(st.sampled_from([1e-9, 0.001, 1.0]))
    recipe["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0]))
    return recipe


@st.composite
def tiny(draw: st.DrawFn, folder: Path) -> dict:
    """Configs of `few` that mostly can be trained, and what is at the edge of it."""
    data = {"crop": draw(counts(12)), "flip": draw(st.booleans())}
    if draw(st.booleans()):
        data["resize"] = data["crop"] + draw(st.integers(0, 3))
    sections: dict[str, dict] = {
        "data": data,
        "model": {"name": "resnet8", "width": draw(counts(3)), "last_gamma": draw(counts(2)) - 1},
        "recipe": draw(recipes(TRAIN, 3)) | {"reference_lr": draw(st.sampled_from([1e-30, 0.01]))},
        "run": {
            "data_root": str(folder),
            "precision": draw(st.sampled_from(["float32", "tf32", "bfloat16", "float64"])),
            "log_every_steps": draw(counts(3)),
            "evaluate_every_epochs": draw(counts(3)),
            "micro_batch": "auto",
        },
    }
    sections["run"]["micro_batch"] = sections["recipe"]["worker_batch"] * draw(counts(4))
    if draw(st.booleans()):
        sections["distill"] = {
            "teacher": str(folder / "teacher.pt"),
            "teacher_model": "resnet8",
            "temperature": draw(st.sampled_from([0.01, 1.0, 4.0, 1000.0])),
            "hard_weight": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "precision": "float32",
        }
        data["unlabelled_images"] = draw(st.sampled_from([0, UNLABELLED]))
    return sections


@explored(10)
@given(st.data())
def test_what_is_accepted_is_planned_and_trained(few, tmp_path, data):
    config = accepted(mapping(**data.draw(tiny(few))))
    assume(config is not None)
    out = tmp_path / str(len(list(tmp_path.iterdir())))
    try:
        render_plan(plan := make_plan(config, ranks=1))
    except UserError as refusal:  # of a network that cannot be trained on such crops
        with pytest.raises(type(refusal)) as again:
            train(config, out)
        assert str(again.value) == str(refusal) and not out.exists()
        return
    result = train(config, out)
    lines = read_log(out / "log.jsonl")
    trained = [line for line in lines if line["event"] == "train"]
    assert trained[-1]["step"] == plan["total_steps"] == config.total_steps
    assert all(math.isfinite(line["loss"]) for line in trained)
    assert all(("kl" in line) == (config.distill is not None) for line in trained)
    assert trained[-1]["lr"] == lr_at(config, config.total_steps - 1) == plan["lr_curve"][-1]
    assert 0 <= result.error <= 100


def accepted(sections: dict) -> Config | None:
    try:
        return config_from_mapping(sections, "test")
    except UserError:
        return None


EDGES: dict[object, list[Any]] = {
    int: [-1, 0, 1, 2, 3, 7, 31, 32, 33, 224, 1000, 2**15, 2**20, 2**31 - 1, 2**31, 10**400],
    float: [-1.0, 0.0, 5e-324, 1e-30, 0.001, 0.5, 1.0, 4.0, 1e3, 3e38, 1e300, math.inf, math.nan],
    "other": [None, True, False, "auto", "", "steps", "cosine", "none", "resnet18", [], [1, 2]],
}
ANYTHING = st.one_of(map(st.sampled_from, EDGES.values()))


@st.composite
def wild(draw: st.DrawFn) -> dict:
    """Configs of any size with up to three values that may be anything."""
    images = draw(st.sampled_from([1, 5, 100, 1281167]))
    sections: dict[str, dict] = {
        "data": {"train_images": images, "crop": draw(st.sampled_from([1, 4, 5, 8, 32, 33, 96]))},
        "model": {"name": draw(st.sampled_from(["resnet8", "resnet8", "resnet8", "resnet18"]))},
        "recipe": draw(recipes(min(images, 64), 10)),
        "run": {},
    }
    if sections["model"]["name"] == "resnet8":
        sections["model"]["width"] = 2
    if draw(st.booleans()):
        sections["distill"] = {"teacher": "teacher.pt", "cache": "cache"}
    for _ in range(draw(st.sampled_from([0, 1, 1, 2]))):
        name = draw(st.sampled_from(sorted(sections)))
        key, field = draw(st.sampled_from(list(SECTIONS[name].model_fields.items())))
        if key == "weights":  # a file, looked for after the data where there is data
            continue
        alike = EDGES.get(int if field.is_required() else type(field.default), EDGES["other"])
        sections[name][key] = draw(st.sampled_from(alike) | ANYTHING)
    return sections


SECTIONS = {
    "data": DataConfig,
    "model": ModelConfig,
    "recipe": RecipeConfig,
    "distill": DistillConfig,
    "run": RunConfig,
}


def said(main: Callable[[list[str]], int], *words: object) -> tuple[int, str]:
    """The exit code of a command, and what it says of a mistake, without the file's name."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = main([str(word) for word in words])
    if code == 0:
        return code, ""
    (line,) = err.getvalue().splitlines()
    return code, re.sub(r"^error: (\S+\.yaml( \+ command line)?: )?", "", line)


@explored(20)
@given(wild())
def test_what_is_refused_is_refused_alike_by_every_command(few, tmp_path, sections):
    alone = {"nodes": 1, "gpus_per_node": 1}
    config, study, cluster = (tmp_path / f"{name}.yaml" for name in ("any", "study", "cluster"))
    config.write_text(yaml.safe_dump(mapping(**sections)))
    base = {"base": str(config), "seeds": [1], "variants": {"base": {"set": {}}}}
    study.write_text(yaml.safe_dump(base))
    cluster.write_text(yaml.safe_dump(CLUSTER | alone | {"folder": str(tmp_path / "runs")}))
    planned = said(cli.main, "plan", config)
    out = tmp_path / "out"
    commands = [
        (launch.__main__.main, "study", study, "--out", out, "--dry-run"),
        (launch.__main__.main, "submit", config, "--cluster", cluster, "--dry-run"),
    ]
    if planned[0]:
        commands += [
            (cli.main, "train", config, "--out", out),
            (cli.main, "verify", config),
        ]
    if planned[0] and "distill" in sections and sections["distill"].get("cache"):
        commands.append((cli.main, "cache", config, "--epochs", 1))
    assert {said(*command) for command in commands} == {planned}
    assert not out.exists()
