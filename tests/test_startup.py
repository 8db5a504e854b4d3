"""Fast imports leave the collector on, and only affect processes without PyTorch."""

import gc
import subprocess
import sys

from harness.startup import import_quickly


def test_the_collector_is_on_again_and_leaves_out_what_was_imported():
    code = """
import gc
from harness.startup import import_quickly
import_quickly("harness.training.setup")
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
kept = gc.get_freeze_count()
import_quickly("harness.execution.trained_model")
assert gc.get_freeze_count() == kept
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_process_that_has_pytorch_keeps_its_collector_as_it_is():
    frozen = gc.get_freeze_count()
    import_quickly("harness.training.setup")
    assert gc.get_freeze_count() == frozen and gc.isenabled()
