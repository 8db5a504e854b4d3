"""The benchmark of memory measures what runs do, compiled on a GPU."""

import json
import sys

import pytest
import torch

from benchmarks import memory
from benchmarks.loops import BARE, OURS
from benchmarks.step import Case

CASE = Case("resnet8", 16, 8, 1, 1)


@pytest.mark.parametrize(
    ("cuda", "words", "compiled"),
    [(True, [], True), (True, ["--no-compile"], False), (False, [], False)],
)
def test_every_loop_is_compiled_where_runs_are(monkeypatch, tmp_path, cuda, words, compiled):
    class Here:
        """A stand-in for a pool of one fresh process."""

        def __init__(self, method):
            assert method == "spawn"

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def Pool(self, processes):
            return self

        def apply(self, function, arguments):
            return function(*arguments)

    def loop(config, model, batches, device):
        seen.append((config.model.name, config.run.precision, config.run.compile))

    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**6)
    monkeypatch.setattr(memory, "resident_mb", {"VmRSS": 1.0, "VmHWM": 3.0}.get)
    monkeypatch.setattr(memory, "get_context", Here)
    monkeypatch.setattr(memory, "LOOPS", dict.fromkeys((OURS, BARE), loop))
    monkeypatch.setattr(memory, "build", lambda name, config, device: None)
    monkeypatch.setattr(memory, "make_batches", lambda config: [None])
    monkeypatch.setattr(memory, "IMPORTED", ())
    monkeypatch.setattr(memory, "CPU_CASES", [CASE])
    monkeypatch.setattr(memory, "GPU_CASES", [CASE])
    monkeypatch.setattr("benchmarks.conditions.conditions", dict)
    monkeypatch.setattr(memory, "set_precision", lambda precision: None)
    words = ["memory", "--repetitions", "2", *words, "--write", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    memory.main()
    precision = "bfloat16" if cuda else "float32"
    assert seen == 4 * [("resnet8", precision, compiled)]
    assert json.loads((tmp_path / "memory.json").read_text())["compile"] == compiled
