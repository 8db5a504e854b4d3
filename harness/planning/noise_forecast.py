"""What the gradient noise measured by one run says of the minibatch of another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from harness.config.loading import load_config
from harness.config.schema import Config
from harness.errors import UserError
from harness.recipe.noise_scale import NoiseScale, SquaredNorms, noise_scale, trade_off
from harness.runs.logging.jsonl import Record, read_log

# what the noise scale belongs to, besides the network and the data
OPTIMIZER = ("optimizer", "momentum", "nesterov", "optimizer_options", "weight_decay")


class NoiseForecast(TypedDict):
    """The trade-off of a minibatch (McCandlish et al. 2018), by the noise scale of a run."""

    run: str
    images: float  # B_simple
    standard_error: float | None
    steps_measured: int
    until_epoch: int
    steps: float  # S / S_min
    examples: float  # E / E_min


def forecast_noise(config: Config, run: Path) -> NoiseForecast:
    """Return the trade-off of `config`'s minibatch by the noise that `run` has measured.

    Steps before the first milestone count, where the learning rate is still at its peak. Raises
    UserError where the run has none, or is of another network, other data or another optimizer.
    """
    measured = load_config(run / "config.yaml")
    if other := _first_difference(config, measured):
        raise UserError(
            f"--noise-from {run}: measured with {other}; a noise scale belongs to one network, "
            "data set and optimizer"
        )
    last = first_milestone(measured)
    norms = measured_norms(read_log(run / "log.jsonl"), last * measured.steps_per_epoch)
    if not norms:
        raise UserError(
            f"--noise-from {run}: has measured no gradient noise before epoch {last}; train it "
            "with run.noise_scale_every=100"
        )
    scale = run_noise_scale(measured, norms)
    if scale.images <= 0:
        raise UserError(
            f"--noise-from {run}: its {len(norms)} steps are too few for an estimate; measure "
            "more of them"
        )
    costs = trade_off(config.recipe.minibatch, scale.images)
    return {
        "run": str(run),
        "images": scale.images,
        "standard_error": scale.standard_error,
        "steps_measured": len(norms),
        "until_epoch": last,
        "steps": costs.steps,
        "examples": costs.examples,
    }


def first_milestone(config: Config) -> int:
    """Return the epoch after which the learning rate first falls by a step, or the last one."""
    by_steps = config.recipe.decay == "steps" and config.recipe.milestones
    return config.recipe.milestones[0] if by_steps else config.recipe.epochs


def measured_norms(lines: Iterable[Record], before_step: int) -> list[SquaredNorms]:
    """Return what the lines of a log hold of a run's first `before_step` steps."""
    return [
        SquaredNorms(line["worker"], line["minibatch"])
        for line in lines
        if line["event"] == "noise_scale" and line["step"] <= before_step
    ]


def run_noise_scale(config: Config, norms: list[SquaredNorms]) -> NoiseScale:
    """Return the noise scale of a run's measured steps, in images."""
    recipe = config.recipe
    return noise_scale(norms, recipe.worker_batch, recipe.minibatch, config.images)


def _first_difference(config: Config, measured: Config) -> str:
    """Return what differs first, with the measured value, or ""."""
    for section in ("model", "data"):
        ours, theirs = (getattr(one, section) for one in (config, measured))
        for name in type(ours).model_fields:
            if getattr(ours, name) != getattr(theirs, name):
                return f"{section}.{name} {getattr(theirs, name)}"
    for name in OPTIMIZER:
        if getattr(config.recipe, name) != (found := getattr(measured.recipe, name)):
            return f"recipe.{name} {found}"
    return ""
