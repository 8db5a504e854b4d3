"""Events of a run besides its training: restarts, damaged images, divergence, warnings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from harness.config.reference import names_with
from harness.config.section import Effect
from harness.outcome import State
from harness.recipe.schedule import lr_at
from harness.report.runs import JsonObject, RecordedRun
from harness.runs.environment import recorded_code_changes

# Keys that a resume may change and that change results; each launch logs those it ran with.
EFFECTS = Effect.ROUNDING, Effect.HARDWARE, Effect.EVALUATION
LOGGED = tuple(name.removeprefix("run.") for name in names_with(*EFFECTS))
LR_TOLERANCE = 1e-6  # relative difference between the logged lr and the config's


@dataclass(frozen=True)
class Event:
    """`kind`: restart, ranks, images, divergence, warning or state."""

    kind: str
    text: str


def run_events(run: RecordedRun) -> list[Event]:
    """List a run's events, the most important first; empty for a run without incident."""
    return [
        *_state(run),
        *_divergence(run),
        *_restarts(run),
        *_code(run),
        *_images(run),
        *_warnings(run),
    ]


def duration(seconds: float) -> str:
    """Format a time for people, such as 12 s, 3 min or 5.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _state(run: RecordedRun) -> Iterator[Event]:
    if run.state is State.FINISHED:
        return
    text = state_name(run.state)
    if "step" in run.status:
        text += f" at step {run.status['step']:,} of {run.status['total_steps']:,}"
    if run.state is State.RUNNING:
        ago = max(time.time() - run.status["heartbeat"], 0)
        text += f", last heartbeat {duration(ago)} before this report"
    elif run.outcome is not None and run.outcome.reason:
        text += f": {run.outcome.reason}"
    yield Event("divergence" if run.state is State.FAILED else "state", text)


def state_name(state: State | None) -> str:
    """Return a run's state for people."""
    return "not started" if state is None else state.value


def _divergence(run: RecordedRun) -> Iterator[Event]:
    for line in run.events:
        if line["event"] == "diverged":
            ids = ", ".join(map(str, line["image_ids"][:4]))
            yield Event(
                "divergence",
                f"diverged at step {line['step'] - 1:,}: {line['why']} (image ids {ids}, …)",
            )


def _restarts(run: RecordedRun) -> Iterator[Event]:
    for before, after in zip(run.launches, run.launches[1:], strict=False):
        lost = max(before.last_step - after.first_step, 0)
        pause = (after.begun - before.ended).total_seconds()
        text = f"resumed at step {after.first_step:,} after a pause of {duration(pause)}"
        if lost:
            text += f"; {_count(lost, 'step')} repeated"
        yield Event("restart", text)
        old, new = before.line["world_size"], after.line["world_size"]
        if old != new:
            yield Event("ranks", f"W {old} → {new} from step {after.first_step:,} on")
        if changed := _changed(before.line, after.line):
            yield Event("warning", f"{changed} from step {after.first_step:,} on")


def _changed(before: JsonObject, after: JsonObject) -> str:
    return ", ".join(
        f"{key} {before[key]} → {after[key]}"
        for key in LOGGED
        if key in before and key in after and before[key] != after[key]
    )


def _code(run: RecordedRun) -> Iterator[Event]:
    for step, changes in recorded_code_changes(run.events).items():
        yield Event("warning", f"other code from step {step:,} on: {changes}")


def _images(run: RecordedRun) -> Iterator[Event]:
    replaced = [line for line in run.events if line["event"] == "replaced"]
    if replaced:
        bad = sorted({line["bad_image_id"] for line in replaced})
        ids = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
        images, uses = _count(len(bad), "damaged image"), _count(len(replaced), "time")
        yield Event("images", f"skipped {images}, {uses} (ids {ids})")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _warnings(run: RecordedRun) -> Iterator[Event]:
    failed = [line for line in run.events if line["event"] == "checkpoint_failed"]
    for line in failed[:3]:
        yield Event("warning", f"checkpoint of step {line['step']:,} not written: {line['why']}")
    if run.overflows:
        updates = _count(run.overflows, "update")
        yield Event("warning", f"float16 overflowed: {updates} skipped")
    if run.headline is not None and run.error is None:
        yield Event(
            "warning",
            f"its recorded error, {run.headline}, covers other epochs than those that count now, "
            "and its log lacks an evaluation to compute it from",
        )
    if off := _lr_off(run):
        yield Event("warning", off)
    if str(run.environment.get("git_commit")).endswith("-dirty"):
        yield Event("warning", "run from a working tree with uncommitted changes")


def _lr_off(run: RecordedRun) -> str:
    """Describe the first logged learning rate that is not the config's; "" if there is none."""
    stride = max(len(run.lr) // 200, 1)
    for step, lr in run.lr[::stride]:
        scheduled = lr_at(run.config, step - 1)
        if abs(lr - scheduled) > LR_TOLERANCE * scheduled:
            return f"lr {lr:.6g} at step {step - 1:,}, where the config says {scheduled:.6g}"
    return ""
