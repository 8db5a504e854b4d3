"""The section `run` of the config: the machine, and how a run is logged, watched and kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from harness.config.section import AsList, Count, CountOrZero, Effect, Positive, Section, Text, key

Precision = Literal["float32", "tf32", "bfloat16", "float16", "float64"]

# Further steps of a profile: those before the timed ones, and at most so many traced after them.
PROFILE_WARM_UP, PROFILE_TRACED = 5, 3


class RunConfig(Section):
    """The machine; a resume may change it, and it changes the curve by rounding at most."""

    effect: ClassVar[Effect] = Effect.NONE  # each key states its own, lest one be forgotten

    data_root: Text = key(
        "Folder of the images, with train/ and val/, or of their archives.",
        "data/imagenet",
        effect=Effect.NONE,
    )
    data_format: Text = key(
        "Format of the images: folder, tar (docs/archives.md), or one that an installed package "
        "adds (docs/data_formats.md).",
        "folder",
        effect=Effect.NONE,
    )
    stage_to: Text | None = key(
        "Folder of each node's own storage to which archives are copied before the first step.",
        None,
        effect=Effect.NONE,
    )
    device: Literal["auto", "cpu", "cuda"] = key(
        "Device of each rank; auto takes GPUs where there are any.", "auto", effect=Effect.HARDWARE
    )
    precision: Precision = key(
        "Number format of forward and backward pass; master weights are float32 or float64.",
        "float32",
        effect=Effect.ROUNDING,
    )
    micro_batch: Count | Literal["auto"] = key(
        "Images that a rank passes through the network together, a multiple of "
        "recipe.worker_batch; auto measures the fastest.",
        "auto",
        unit="images",
        effect=Effect.HARDWARE,
    )
    sums: Literal["exact", "fast", "auto"] = key(
        "How gradients and statistics are summed: exact gives the same bits on any number of "
        "ranks, fast sums floats as DDP does, auto is exact where that costs at most 3 % "
        "(docs/one-curve.md).",
        "auto",
        effect=Effect.ROUNDING,
    )
    unit_workers: Count = key(
        "Workers of one pass where sums are exact; it must divide the number of workers.",
        1,
        unit="workers",
        effect=Effect.ROUNDING,
    )
    intra_op_threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = key(
        "Threads of an operation on a CPU; auto is PyTorch's choice, and 1 where sums are exact, "
        "as it changes rounding.",
        "auto",
        effect=Effect.HARDWARE,
    )
    compile: bool | Literal["auto"] = key(
        "Compile residual blocks with torch.compile; auto does so on GPUs.",
        "auto",
        effect=Effect.ROUNDING,
    )
    gradient_precision: Literal["float32", "bfloat16"] = key(
        "Number format in which gradients are summed over the ranks.",
        "float32",
        effect=Effect.ROUNDING,
    )
    loader: Literal["auto", "dali", "reference", "memory"] = key(
        "What decodes images; auto takes DALI where it is installed.",
        "auto",
        effect=Effect.ROUNDING,
    )
    loader_threads: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = key(
        "Decoding threads or processes of a rank; auto shares the machine's cores.",
        "auto",
        effect=Effect.SPEED,
    )
    evaluate_every_epochs: Count = key(
        "Epochs between evaluations; those that a run's error is made of are always evaluated.",
        1,
        unit="epochs",
        effect=Effect.NONE,
    )
    recalibrate_images: CountOrZero = key(
        "Training images from which each evaluation takes batch norm's running statistics with the "
        "weights as they are, a multiple of recipe.worker_batch; 0 takes the averages of training.",
        0,
        unit="images",
        effect=Effect.EVALUATION,
    )
    noise_scale_every: CountOrZero = key(
        "Steps between measurements of the gradient noise scale (docs/noise-scale.md); 0 measures "
        "none.",
        0,
        unit="steps",
        effect=Effect.NONE,
    )
    log_every_steps: Count = key(
        "Steps between lines of the log.", 20, unit="steps", effect=Effect.NONE
    )
    checkpoint_every_minutes: Positive = key(
        "Time between checkpoints, besides those at the end of each epoch.",
        10.0,
        unit="minutes",
        effect=Effect.NONE,
    )
    keep_checkpoints: Count = key(
        "Newest checkpoints to keep, besides the best.", 3, unit="checkpoints", effect=Effect.NONE
    )
    hang_timeout_s: Annotated[float, Field(gt=0, le=1e6)] = key(
        "Time without progress after which a rank counts as hung and all ranks end.",
        300.0,
        unit="seconds",
        effect=Effect.NONE,
    )
    profile_steps: CountOrZero = key(
        "Steps to profile after the first few; 0 profiles none.",
        0,
        unit="steps",
        effect=Effect.NONE,
    )
    loggers: Annotated[tuple[Text, ...], AsList] = key(
        "Loggers of installed packages, besides those built in (docs/loggers.md).",
        (),
        effect=Effect.NONE,
    )

    def meaningless(self) -> dict[str, str]:
        keys = {"unit_workers": "sums: fast"} if self.sums == "fast" else {}
        if self.data_format != "tar":
            keys["stage_to"] = f"data_format: {self.data_format}"
        return keys

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.sums == "exact" and self.gradient_precision == "bfloat16":
            yield (
                "gradient_precision: bfloat16 rounds each rank's sum, which sums: exact rules "
                "out; remove it, or set sums: fast"
            )
