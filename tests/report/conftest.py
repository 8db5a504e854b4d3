"""Real run folders for reports: a small study, an interrupted run, and one that diverged."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config.loading import load_config
from harness.training.run import Diverged
from harness.training.setup import train
from tests.conftest import SMALL, harness, start_ranks

CHANGED = "run.gradient_precision=bfloat16"
HOSTILE = "</script><script>document.title = 'harmed'</script><img src=x onerror=alert(1)>"
RUNS = [("gradual", 1), ("gradual", 2), ("none", 1)]  # (variant, seed)


def _write(path: Path, data: Path, **changes: Any) -> Path:
    mapping = {key: dict(value) for key, value in SMALL.items() if isinstance(value, dict)}
    mapping["run"]["data_root"] = str(data)
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        mapping[section][leaf] = value
    path.write_text(yaml.safe_dump(mapping))
    return path


@pytest.fixture(scope="session")
def study(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STUDY/VARIANT/SEED: two seeds of gradual warm-up, one of none. Tests must not change it."""
    folder = tmp_path_factory.mktemp("studies") / "warmup"
    for variant, seed in RUNS:
        expected = json.dumps({"error": 60.0, "std": 25.0, "runs": 5, "source": HOSTILE})
        expect = [f"seed={seed}", f"expect={expected}"]
        warmup = ["recipe.warmup=none"] if variant == "none" else []
        folder.mkdir(exist_ok=True)
        config = _write(folder.parent / f"{variant}.yaml", digits)
        if warmup:
            text = yaml.safe_load(config.read_text())
            del text["recipe"]["warmup_epochs"]
            config.write_text(yaml.safe_dump(text))
        train(load_config(config, [*expect, *warmup]), folder / variant / str(seed))
    return folder


@pytest.fixture(scope="session")
def harmed(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed on one rank after step 8, once the checkpoint of step 5 is written, resumed on two
    with other rounding; one image is damaged. 6 epochs of 5 steps."""
    folder = tmp_path_factory.mktemp("harmed")
    data = Path(shutil.copytree(digits, folder / "digits"))
    next(iter(sorted((data / "train" / "3").iterdir()))).write_bytes(b"no image")
    changes: dict[str, Any] = {"recipe__epochs": 6, "run__log_every_steps": 1}
    config = _write(folder / "c.yaml", data, data__on_bad_image="skip", **changes)
    (process,) = start_ranks(
        1, ["-m", "harness", "train", str(config), "--out", str(folder / "run")]
    )
    assert process.stdout is not None
    checkpoint = folder / "run" / "checkpoints" / "checkpoint-001-00000005.pt"
    for line in process.stdout:
        step = re.search(r"step (\d+)/", line)
        if step and int(step[1]) >= 8 and checkpoint.exists():
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out = harness("train", config, "--out", folder / "run", "--resume", CHANGED, ranks=2)
    assert out.returncode == 0, out.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def diverged(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loss is not finite at step 1."""
    folder = tmp_path_factory.mktemp("diverged")
    config = load_config(_write(folder / "c.yaml", digits, recipe__reference_lr=1e30))
    with pytest.raises(Diverged):
        train(config, folder / "run")
    return folder / "run"


Line = dict[str, Any]


@pytest.fixture
def written(tmp_path: Path, digits: Path) -> Callable[..., Path]:
    """Write a run folder with a given log and status, for numbers that a person computed."""

    def write(
        lines: list[Line], name: str = "run", torn: str = "", state: str = "finished", **status: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        changes = status.pop("config", {})
        _write(folder / "config.yaml", digits, **changes)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "log.jsonl").write_text(text + torn)
        (folder / "status.json").write_text(json.dumps({"state": state, **status}))
        return folder

    return write
