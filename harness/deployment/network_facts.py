"""Facts about a trained network that its users need beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from harness import __version__
from harness.config.loading import curve_digest
from harness.execution.evaluation import Evaluation
from harness.execution.trained_model import TrainedModel
from harness.runs.logging.jsonl import Record, read_lines, read_log


@dataclass(frozen=True)
class NetworkFacts:
    """Facts that an exported file states about its network.

    Attributes:
        trained: The network.
        evaluation: The run's own result with these weights; None where no log records it, or it
            is one with recalibrated statistics (`run.recalibrate_images`).
        starts: The log's events of starts and resumes, those without effect included.
        environment: The content of the run's environment.json; empty where there is none.
        weights_sha256: The digest of the weights, as the run recorded it at its end; "" for the
            checkpoint of another step.

    """

    trained: TrainedModel
    evaluation: Evaluation | None
    starts: tuple[Record, ...]
    environment: Record
    weights_sha256: str = ""

    @property
    def classes(self) -> list[str]:
        """Names in the order of the logits; empty where an old checkpoint records none."""
        return list(self.trained.class_names)

    def metadata(self) -> dict[str, str]:
        """Return the facts as text, for the metadata of a file; lists are JSON."""
        config, evaluation = self.trained.config, self.evaluation
        data, model = config.data, config.model
        facts = {
            "architecture": model.name,
            "model": json.dumps({"name": model.name, **_options(self.trained)}),
            "class_names": json.dumps(self.classes),
            "mean": json.dumps(data.mean),
            "std": json.dumps(data.std),
            "crop": str(data.crop),
            "resize": str(data.resize),
            "interpolation": "bilinear",
            "config_sha256": curve_digest(config),
            "epochs": str(self.trained.step / config.steps_per_epoch),
            "harness": __version__,
        }
        if evaluation is not None:
            low, high = evaluation.error_interval()
            facts["error_percent"] = f"{evaluation.error:.4f}"
            facts["error_interval_95_percent"] = json.dumps([round(low, 4), round(high, 4)])
            facts["evaluated_images"] = str(evaluation.total)
        if self.weights_sha256:
            facts["trained_weights_sha256"] = self.weights_sha256
        return facts


def gather_facts(trained: TrainedModel) -> NetworkFacts:
    """Read the facts from the checkpoint and from the run folder that it is in, if it is in one."""
    checkpoints = trained.checkpoint.parent
    if checkpoints.name != "checkpoints":
        return NetworkFacts(trained, None, (), {})
    folder = checkpoints.parent
    log = folder / "log.jsonl"
    starts = [line for line in read_lines(log) if line["event"] in ("start", "resume")]
    return NetworkFacts(
        trained,
        _evaluation(log, trained.step, trained.config.data.val_images),
        tuple(starts),
        _environment(folder / "environment.json"),
        _weights_sha256(log, trained.step),
    )


def _options(trained: TrainedModel) -> dict[str, object]:
    """Return what else than its name determines the network's layers."""
    model = trained.config.model
    width = {} if "width" in model.meaningless() else {"width": model.width}
    return width | ({"options": model.options} if model.options else {})


def _evaluation(log: Path, step: int, images: int) -> Evaluation | None:
    for line in read_log(log):
        own = line["event"] == "evaluation" and line["step"] == step and line["total"] == images
        if own and "recalibrate_images" not in line:
            top5 = round((1 - line["top5_error"] / 100) * images)
            return Evaluation(line["correct"], top5, images, line["loss"])
    return None


def _weights_sha256(log: Path, step: int) -> str:
    finished = [line for line in read_log(log) if line["event"] == "finish"]
    return next((line.get("weights_sha256", "") for line in finished if line["step"] == step), "")


def _environment(file: Path) -> Record:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):  # lost or torn: the card says that it is not recorded
        return {}
    return found if isinstance(found, dict) else {}
