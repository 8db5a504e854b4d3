"""Resume a run: choose its newest checkpoint, check that it fits, and load it."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from harness.data.batch_plan import BatchPlan
from harness.data.sources.digest import first_difference
from harness.distillation.teacher import AnyTeacher
from harness.distributed import broadcast_from_rank0, first_reason
from harness.errors import UserError
from harness.models.weights import LoadedWeights
from harness.runs.checkpoint import DamagedCheckpoint, Payload, newest_checkpoint, read_checkpoint
from harness.training.step import Step


@dataclass(frozen=True)
class Start:
    """Where a start of a run begins: after `step` steps, with the validation errors so far.

    `errors`: epoch, counted from 1 -> error in %. `weights`: what a new run started from, if not
    from initial values.
    """

    step: int = 0
    errors: Mapping[int, float] = field(default_factory=dict)
    weights: LoadedWeights | None = None


START = Start()  # of a new run


def choose_checkpoint(run: Path) -> Path | None:
    """Return the newest valid checkpoint of a run folder; report damaged ones.

    None where the run ended before its first checkpoint. Raises UserError where none is valid.
    """
    found = newest_checkpoint(run / "checkpoints", lambda text: print(f"warning: {text}"))
    if found is None:
        print(f"warning: {run}: holds no checkpoint; starting from step 0", flush=True)
        return None
    return found[0]


def restore(
    checkpoint: Path,
    step: Step,
    batch_plan: BatchPlan,
    teacher: AnyTeacher | None,
    control: dist.ProcessGroup | None,
) -> Start:
    """Load a checkpoint that any number of ranks wrote into `step`, on all ranks.

    Raises UserError where the data or the teacher are not those that the run began with, and as
    `load_alike`.
    """
    run = checkpoint.parents[1]
    payload = load_alike(checkpoint, control)
    _check_data(run, payload, batch_plan, warn=control is None or dist.get_rank() == 0)
    if teacher and teacher.identity != payload["teacher"]:
        raise UserError(
            f"{run}: distill.teacher or its cache differs from the one at the start; restore it, "
            "or start a new run with another --out"
        )
    step.load_state_dict(payload)
    return Start(payload["step"], dict(payload["errors"]))


def _check_data(run: Path, payload: Payload, batch_plan: BatchPlan, warn: bool) -> None:
    """Compare the data: labels and image ids are positions in the index, so order matters."""
    indices = {"train": batch_plan.train, "val": batch_plan.val}
    here = {split: index.class_digests() for split, index in indices.items()}
    then = payload.get("class_digests")
    if then is None:  # written by an older harness, which kept the names alone
        classes = batch_plan.train.classes
        then = {"train": dict.fromkeys(payload.get("class_names", classes), "")}
        here = {"train": dict.fromkeys(classes, "")}
        if warn:
            print(
                f"warning: {run}: its checkpoint has no digest of the data, so nothing but the "
                "class names was compared",
                flush=True,
            )
    for split, digests in then.items():
        place = str(indices[split].location)
        if difference := first_difference(digests, here[split], "the checkpoint", place):
            raise UserError(
                f"{run}: was trained on other data: {difference}; restore the data, or start a "
                "new run with another --out"
            )


def load_alike(path: Path, control: dist.ProcessGroup | None) -> Payload:
    """Load a checkpoint that every rank reads by itself, from a file that must be the same.

    No weights are sent after this, so ranks whose nodes do not share the run folder would train
    apart. Raises UserError, on all ranks, where one cannot read the file or finds a different one
    under its name.
    """
    payload: Payload = {}
    digest = reason = ""
    try:
        payload, digest = read_checkpoint(path)
    except DamagedCheckpoint as error:
        reason = f"{error} (on {socket.gethostname()})"
    if digest != broadcast_from_rank0(digest, control) and not reason:
        reason = f"{path}: on {socket.gethostname()} is not the same file as for rank 0"
    if reason := first_reason(reason, control):
        raise UserError(f"{reason}; keep the run folder where all ranks share it")
    return payload
