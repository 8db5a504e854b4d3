"""Training in a process of a library's user leaves the process's settings as it found them."""

import signal
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo as dynamo

from harness import load_config
from harness.execution.compilation import compile_blocks
from harness.execution.precision import FLOAT32_SETTINGS
from harness.resilience.stopping import SIGNALS
from harness.training.setup import train
from harness.training.tuning import malloc
from tests.test_train import assert_same, final_weights
from tests.training.test_step import float32_arithmetic

DYNAMO = ("recompile_limit", "suppress_errors", "optimize_ddp")  # what compiled passes set


def settings():
    return {
        "signals": {number: signal.getsignal(number) for number in SIGNALS},
        "excepthooks": (threading.excepthook, sys.excepthook),
        "streams": (sys.stdout, sys.stderr),
        "float32": [setting.fp32_precision for setting in FLOAT32_SETTINGS],
        "kernels": float32_arithmetic(),
        "dynamo": {key: getattr(dynamo.config, key) for key in DYNAMO},
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "threads": {thread.name for thread in threading.enumerate()},
        "process group": torch.distributed.is_initialized(),
    }


@pytest.fixture
def a_users_settings():
    """Handlers, hooks and precision that a user's program has set."""

    def handle(*_):
        pass

    hook, handlers = threading.excepthook, {n: signal.signal(n, handle) for n in SIGNALS}
    before = [setting.fp32_precision for setting in FLOAT32_SETTINGS]
    threading.excepthook = lambda arguments: hook(arguments)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield
    threading.excepthook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for setting, arithmetic in zip(FLOAT32_SETTINGS, before, strict=True):
        setting.fp32_precision = arithmetic


@pytest.mark.usefixtures("a_users_settings")
def test_runs_of_several_precisions_leave_no_trace_in_the_process(small, tmp_path, monkeypatch):
    def refuse(name):
        raise AssertionError("a library sets what it cannot restore")

    monkeypatch.setattr(malloc, "ctypes", SimpleNamespace(CDLL=refuse))
    monkeypatch.setattr(
        "harness.training.replica.compile_blocks", partial(compile_blocks, backend="eager")
    )
    path = small(recipe__epochs=1, recipe__milestones=[], recipe__warmup_epochs=1)
    train(load_config(path), tmp_path / "warm-up")  # libraries start their own threads
    before = settings()
    weights = {}
    for name, overrides in {
        "float32": [],
        "bfloat16, compiled": ["run.precision=bfloat16", "run.compile=true"],
        "tf32": ["run.precision=tf32"],
        "float64": ["run.precision=float64"],
        "float32 again": [],
    }.items():
        train(load_config(path, overrides), tmp_path / name)
        assert settings() == before, name
        weights[name] = final_weights(tmp_path / name)
    assert_same(weights["float32"], weights["float32 again"], 0.0)


@pytest.mark.usefixtures("a_users_settings")
def test_a_run_that_fails_leaves_no_trace_either(small, tmp_path, monkeypatch):
    def fail(self, done):
        raise RuntimeError("planted")

    before = settings()
    monkeypatch.setattr("harness.training.run.Run.log_line", fail)
    with pytest.raises(RuntimeError, match="planted"):
        train(load_config(small(), ["run.precision=tf32"]), tmp_path / "run")
    after = settings()
    assert after | {"threads": before["threads"]} == before
