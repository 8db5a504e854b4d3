"""The code of plug-ins counts as code of a run."""

import json

import pytest

from harness.config.loading import load_config
from harness.plug_ins import all_modules, modules_behind_results
from harness.runs.environment import code_digest
from harness.training.setup import train
from tests.packages import install, install_page


def test_a_config_names_the_modules_that_it_uses(small, tmp_path, monkeypatch):
    install_page("networks.md", tmp_path, monkeypatch)
    install_page("optimizers.md", tmp_path, monkeypatch)
    install_page("data_formats.md", tmp_path, monkeypatch)
    install_page("loggers.md", tmp_path, monkeypatch)
    own = ["model.name=convnet2", "model.width=null"]
    assert modules_behind_results(load_config(small())) == ()
    assert modules_behind_results(load_config(small(), own)) == ("small_convnets",)
    own += ["recipe.optimizer=clipped"]
    own += ["run.data_format=zip", "run.loggers=[csv]"]
    config = load_config(small(), own)
    behind = ("clipped_sgd", "small_convnets", "zip_images")
    assert modules_behind_results(config) == behind
    assert {*all_modules(config)} == {"csv_logger", *behind}  # a logger changes no result


def test_a_resume_under_another_plug_in_says_so(small, tmp_path, monkeypatch, capsys):
    site = tmp_path / "site"
    code = """
import torch

class Plain(torch.optim.SGD):
    def __init__(self, groups):
        super().__init__(groups, lr=0.0)
"""
    point = ("harness.optimizers", "plain = plain_sgd:Plain")
    install(site, monkeypatch, "plain_sgd", code, *point)
    own = ["recipe.optimizer=plain"]
    config = load_config(small(), own)
    train(config, tmp_path / "run")
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    before = code_digest(("harness", "plain_sgd"))
    assert environment["code_digest"] == before != code_digest()
    # as if the run had been cut off at its last but one epoch
    status = tmp_path / "run" / "status.json"
    status.write_text(status.read_text().replace('"finished"', '"stopped"'))
    for path in sorted((tmp_path / "run" / "checkpoints").glob("*15.*")):
        path.unlink()
    (site / "plain_sgd.py").write_text(code + "# edited\n")
    code_digest.cache_clear()
    train(config, tmp_path / "run", resume=True)
    assert "under other conditions: code " in capsys.readouterr().out


@pytest.fixture(autouse=True)
def fresh_digests():
    """Digests are kept for the life of a process, whose code does not change outside of tests."""
    code_digest.cache_clear()
    yield
    code_digest.cache_clear()
