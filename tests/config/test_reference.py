"""The facts on the config's keys, and what is generated from them."""

import json
from pathlib import Path

import jsonschema
import pytest

from harness.commands.command_line import main
from harness.config.loading import load_config, read_mapping
from harness.config.reference import (
    json_schema,
    keys,
    names_with,
    render_markdown,
    render_reference,
    value_of,
)
from harness.config.run_section import RunConfig
from harness.config.section import Effect

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    path
    for path in (ROOT / "configs").rglob("*.yaml")
    if path.parent.name not in ("studies", "clusters")
)


@pytest.mark.parametrize("key", keys(), ids=lambda key: key.name)
def test_every_key_is_described(key):
    assert key.description[0].isupper() and key.description.endswith("."), key
    if key.name.startswith("run."):  # where the section's default could hide a change of rounding
        extra = RunConfig.model_fields[key.name.removeprefix("run.")].json_schema_extra
        assert extra["effect"] == key.effect.value
    named = {"_s": "seconds", "_minutes": "minutes", "_epochs": "epochs", "_steps": "steps"}
    for ending, unit in named.items():
        if key.name.endswith(ending):
            assert key.unit == unit


def test_the_effects_are_those_that_the_contract_of_resuming_names():
    assert set(names_with(Effect.ROUNDING)) == {
        *("run.precision", "run.compile", "run.gradient_precision", "run.loader"),
        *("run.sums", "run.unit_workers"),
    }
    hardware = {"run.device", "run.micro_batch", "run.intra_op_threads"}
    assert set(names_with(Effect.HARDWARE)) == hardware
    assert set(names_with(Effect.EVALUATION)) == {"run.recalibrate_images"}
    outside_run = {key.name for key in keys() if not key.name.startswith(("run.", "expect."))}
    assert set(names_with(Effect.CURVE)) == outside_run


@pytest.mark.parametrize(
    ("path", "text"),
    [("docs/config.md", render_markdown()), ("configs/schema.json", json_schema())],
)
def test_generated_files_are_up_to_date(path, text):
    assert (ROOT / path).read_text() == text, "run make reference"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_json_schema_takes_every_shipped_config(path):
    validator = jsonschema.Draft202012Validator(json.loads(json_schema()))
    stored = load_config(path).model_dump(mode="json")  # as a run folder keeps it
    assert [*validator.iter_errors(read_mapping(path)), *validator.iter_errors(stored)] == []


def test_the_json_schema_refuses_a_misspelt_key_and_a_wrong_value():
    validator = jsonschema.Draft202012Validator(json.loads(json_schema()))
    mapping = read_mapping(ROOT / "configs" / "quickstart.yaml")
    mapping["recipe"] |= {"minibach": 256, "momentum": 1.5}
    refused = sorted(error.message for error in validator.iter_errors(mapping))
    assert len(refused) == 2
    assert "minibach" in refused[1] or "minibach" in refused[0]


def test_one_key_and_one_section(capsys):
    assert main(["config", "recipe.warmup_epochs"]) == 0
    one = capsys.readouterr().out
    assert one.splitlines()[0] == "recipe.warmup_epochs"
    assert "  default  5\n" in one and "  unit     epochs\n" in one and "effect   curve" in one
    assert main(["config", "distill"]) == 0
    section = capsys.readouterr().out
    assert "distill.temperature" in section and "recipe." not in section.splitlines()[1]
    assert set(render_reference().split()) >= {key.name for key in keys()}
    assert max(map(len, render_reference().splitlines())) <= 110


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("recipe.warmup_epoch", "did you mean recipe.warmup_epochs?"),
        ("minibach", "did you mean recipe.minibatch?"),
        ("recip.epochs", "recip: unknown key, did you mean recipe?"),
        ("expect.zzz", "known here: error, std, runs, source"),
    ],
)
def test_an_unknown_key_is_refused_in_one_line(name, nearest, capsys):
    assert main(["config", name]) == 2
    message = capsys.readouterr().err
    assert nearest in message and len(message.splitlines()) == 1


def test_values_by_dotted_name():
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    assert value_of(config, "recipe.minibatch") == 256
    assert value_of(config, "seed") == 1
    assert value_of(config, "distill.temperature") is None  # it has no such section
