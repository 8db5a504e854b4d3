"""The config: the sections of a YAML file, as a frozen and strictly typed tree.

Everything outside `run:` and `expect:` determines the training curve; `run:` describes the machine.
A config never corrects a mistake: loading raises a ConfigError of one line with file and key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from harness.config.distill_section import DistillConfig
from harness.config.model_section import ModelConfig
from harness.config.run_section import PROFILE_TRACED, PROFILE_WARM_UP, RunConfig
from harness.config.section import (
    LARGEST_FLOAT32,
    LARGEST_SIDE,
    AsList,
    Count,
    CountOrZero,
    Effect,
    Fraction,
    NotNegative,
    Options,
    Positive,
    Section,
    Text,
    key,
)

Areas = Annotated[tuple[Positive, Positive], AsList]
Ratio = Annotated[float, Field(ge=0.001, le=1000)]
Ratios = Annotated[tuple[Ratio, Ratio], AsList]
# For pixels from 0 to 1, so that values meant for pixels from 0 to 255 are refused.
Colour = Annotated[tuple[Fraction, Fraction, Fraction], AsList]
Deviation = Annotated[float, Field(ge=0.001, le=1)]
ColourScale = Annotated[tuple[Deviation, Deviation, Deviation], AsList]
Epochs = Annotated[tuple[Count, ...], AsList]

NO_EXPECTATION = "no expectation for this recipe"
# the keys of the recipe that each built-in optimizer has; others have optimizer_options
OPTIMIZER_KEYS = {"sgd": ("momentum", "nesterov"), "lars": ("momentum", "trust_coefficient")}
OTHER_OPTIMIZERS_KEYS = ("optimizer_options",)


class ExpectConfig(Section):
    """The error that the recipe should reach, its spread, and the source of the figure."""

    effect: ClassVar[Effect] = Effect.NONE

    error: Annotated[float, Field(ge=0, le=100)] = key(
        "Expected validation error (mean over `runs`).", unit="%"
    )
    std: NotNegative | None = key(
        "Sample standard deviation over `runs`; a verdict needs both.", None, unit="% points"
    )
    runs: Count | None = key(
        "Number of runs, each with its own seed, behind `error`.", None, unit="runs"
    )
    source: Text = key("Where the figure comes from.")

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.std is not None and self.runs == 1:
            yield "std: one run has none; remove it, or give the runs that it is over"

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        runs = "" if self.runs is None else f"{self.runs} run{'s' * (self.runs != 1)}, "
        return f"{self.error:.2f}{spread} % ({runs}{self.source})"


class DataConfig(Section):
    """The images, and how crops are taken from them."""

    train_images: Count = key(
        "Number of labelled training images; training checks it against the data.", unit="images"
    )
    val_images: Count = key("Number of validation images, checked likewise.", unit="images")
    classes: Annotated[int, Field(ge=1, le=2**20)] = key(
        "Number of classes, checked likewise.", unit="classes"
    )
    unlabelled_images: CountOrZero = key(
        "Number of training images without labels, for distillation only.", 0, unit="images"
    )
    crop: Annotated[int, Field(ge=1, le=LARGEST_SIDE)] = key(
        "Side of the square crop in training and evaluation; at most `resize`.", 224, unit="pixels"
    )
    resize: Annotated[int, Field(ge=1, le=2 * LARGEST_SIDE)] = key(
        "Short side of an image at evaluation, before its central crop; by default in the "
        "paper's ratio of 256 to a crop of 224 (section 5.1).",
        unit="pixels",
        computed=lambda data: round(data["crop"] * 256 / 224),
    )
    crop_area: Areas = key(
        "Smallest and largest share of an image's area that a training crop covers.", (0.08, 1.0)
    )
    crop_ratio: Ratios = key(
        "Smallest and largest ratio of width to height of a training crop before it is resized.",
        (0.75, 1.3333333333333333),
    )
    flip: bool = key("Flip half of the training images horizontally, at random.", True)
    mean: Colour = key(
        "Mean of red, green and blue for pixels from 0 to 1; subtracted.", (0.485, 0.456, 0.406)
    )
    std: ColourScale = key(
        "Standard deviation of red, green and blue for pixels from 0 to 1; divided by.",
        (0.229, 0.224, 0.225),
    )
    on_bad_image: Literal["fail", "skip"] = key(
        "What to do with a training image that cannot be decoded: end the run, or train on the "
        "next one in its place and log it.",
        "fail",
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.crop > self.resize:
            yield f"crop: {self.crop} is larger than resize {self.resize}; lower it or raise resize"
        if not self.crop_area[0] <= self.crop_area[1] <= 1:
            yield f"crop_area: expected low <= high <= 1, found {[*self.crop_area]}"
        if self.crop_ratio[0] > self.crop_ratio[1]:
            yield f"crop_ratio: expected low <= high, found {[*self.crop_ratio]}"


class RecipeConfig(Section):
    """The paper's recipe: minibatch, learning rate, momentum, decay."""

    minibatch: Count = key(
        "Images of one optimizer step, the paper's kn; a multiple of `worker_batch`.", unit="images"
    )
    worker_batch: Count = key(
        "Images of one worker, the paper's n: batch norm's statistics are over them (section 2.3).",
        32,
        unit="images",
    )
    epochs: Count = key(
        "Length of the training; an epoch has floor(images / kn) steps.", unit="epochs"
    )
    reference_lr: Positive = key("Learning rate at `reference_minibatch`.", 0.1)
    reference_minibatch: Count = key(
        "Minibatch for which `reference_lr` was tuned.", 256, unit="images"
    )
    classifier_lr_factor: Positive = key(
        "Factor of the classifier's learning rate, for fine-tuning.", 1.0
    )
    scaling: Literal["linear", "sqrt", "none"] = key(
        "How the learning rate follows the minibatch (section 2.1, table 2a).", "linear"
    )
    warmup: Literal["gradual", "constant", "none"] = key(
        "Warm-up to the scaled learning rate (section 2.2): a constant increase every step, the "
        "reference learning rate throughout, or none.",
        "gradual",
    )
    warmup_epochs: Count = key(
        "Length of the warm-up; there is none where nothing is scaled up.", 5, unit="epochs"
    )
    decay: Literal["steps", "cosine", "polynomial"] = key(
        "How the learning rate falls after the warm-up: by `decay_factor` at each milestone, along "
        "a cosine, or as the remaining share of the steps to the power `decay_power`.",
        "steps",
    )
    milestones: Epochs = key(
        "Epochs after which the learning rate falls, warm-up included, in rising order.",
        (30, 60, 80),
        unit="epochs",
    )
    decay_factor: Annotated[float, Field(gt=0, le=1)] = key(
        "Factor of the learning rate at each milestone.", 0.1
    )
    decay_power: Positive = key("Power of the polynomial decay.", 2.0)
    optimizer: Text = key(
        "Name of the optimizer: sgd, lars, or one that an installed package adds "
        "(docs/optimizers.md).",
        "sgd",
    )
    optimizer_options: Options = key(
        "Arguments of an optimizer of an installed package, such as beta: 0.9.", {}
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = key("Momentum m of SGD and LARS.", 0.9)
    nesterov: bool = key("Use Nesterov's momentum of SGD; needs a momentum above 0.", True)
    trust_coefficient: Annotated[float, Field(gt=0, le=LARGEST_FLOAT32)] = key(
        "Factor of LARS's layer-wise learning rates (docs/optimizers.md).", 0.001
    )
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST_FLOAT32)] = key(
        "Weight decay λ, not applied to batch norm's γ and β (section 5.1).", 0.0001
    )
    label_smoothing: Fraction = key("Label smoothing of the cross entropy.", 0.0)

    def meaningless(self) -> dict[str, str]:
        everywhere = [*OTHER_OPTIMIZERS_KEYS, *(k for own in OPTIMIZER_KEYS.values() for k in own)]
        others = [name for name in everywhere if name not in self.optimizer_keys]
        keys = dict.fromkeys(others, f"optimizer: {self.optimizer}")
        if self.decay != "steps":
            keys |= dict.fromkeys(("milestones", "decay_factor"), f"decay: {self.decay}")
        if self.decay != "polynomial":
            keys |= {"decay_power": f"decay: {self.decay}"}
        if self.warmup == "none":
            keys |= {"warmup_epochs": "warmup: none"}
        return keys

    @property
    def optimizer_keys(self) -> tuple[str, ...]:
        """Return the keys that configure the optimizer, besides the weight decay."""
        return OPTIMIZER_KEYS.get(self.optimizer, OTHER_OPTIMIZERS_KEYS)

    @property
    def optimizer_arguments(self) -> Options:
        """Return the arguments of the optimizer's build function besides the parameter groups."""
        if self.optimizer not in OPTIMIZER_KEYS:
            return self.optimizer_options
        return {name: getattr(self, name) for name in self.optimizer_keys}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        kn, n = self.minibatch, self.worker_batch
        if kn % n:
            nearest = " or ".join(str(m) for m in (kn // n * n, (kn // n + 1) * n) if m)
            yield f"minibatch: {kn} is not a multiple of worker_batch {n}; take {nearest}"
        if self.nesterov and self.momentum == 0 and "nesterov" in self.optimizer_keys:
            yield "nesterov: needs a momentum above 0; set nesterov: false or raise momentum"
        if self.reference_lr * max(kn / self.reference_minibatch, 1) > LARGEST_FLOAT32:
            yield f"reference_lr: {self.reference_lr:g}, scaled, is no float32 number; lower it"
        if self.warmup_end > self.epochs:
            yield (
                f"warmup_epochs: {self.warmup_epochs} is past the end (epochs: {self.epochs}); "
                "lower warmup_epochs or raise epochs"
            )
        if self.decay == "steps":
            yield from self._milestone_problems()

    @property
    def warmup_end(self) -> int:
        """Epoch at which the warm-up ends; 0 where there is none, or nothing is scaled up.

        Section 5.1: the ramp from 0.1 is for kn > 256, that is for a peak above the reference lr.
        """
        scaled_up = self.scaling != "none" and self.minibatch > self.reference_minibatch
        return self.warmup_epochs if scaled_up and self.warmup != "none" else 0

    def _milestone_problems(self) -> Iterator[str]:
        start, end = self.warmup_end, self.epochs
        if early := [m for m in self.milestones if m < start]:
            yield f"milestones: {early} inside the warm-up; take epochs from {start} on"
        if late := [m for m in self.milestones if m >= end]:
            yield f"milestones: {late} past the end (epochs: {end}); take epochs below {end}"
        if list(self.milestones) != sorted(set(self.milestones)):
            yield f"milestones: {[*self.milestones]} must rise from one to the next; sort them"


class Config(Section):
    """A complete config; its sections and keys are those of the YAML file."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = key(
        "Seed of initialization, shuffling and augmentation.", 1
    )
    expect: ExpectConfig | None = None
    data: DataConfig
    model: ModelConfig
    recipe: RecipeConfig
    distill: DistillConfig | None = None
    run: RunConfig = RunConfig()

    @property
    def workers(self) -> int:
        """The paper's k: the number of workers, each of n = recipe.worker_batch images."""
        return self.recipe.minibatch // self.recipe.worker_batch

    @property
    def images(self) -> int:
        """N, the number of images in an epoch."""
        return self.data.train_images + self.data.unlabelled_images

    @property
    def steps_per_epoch(self) -> int:
        """floor(N / kn); the last N mod kn places of an epoch's shuffling are not used."""
        return self.images // self.recipe.minibatch

    @property
    def warmup_steps(self) -> int:
        """Number of warm-up steps; 0 where there is none."""
        return self.recipe.warmup_end * self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.recipe.epochs

    def problems(self) -> Iterator[str]:
        for name in type(self).model_fields:
            if isinstance(section := getattr(self, name), Section):
                yield from (f"{name}.{problem}" for problem in section.problems())
        kn, n, micro_batch = self.recipe.minibatch, self.recipe.worker_batch, self.run.micro_batch
        unit = self.run.unit_workers
        if self.steps_per_epoch == 0:
            yield (
                f"recipe.minibatch: {kn} is more than the {self.images} training images, an epoch "
                "has no step; lower it"
            )
        if self.data.unlabelled_images and (self.distill is None or not self.distill.weights[1]):
            yield (
                "data.unlabelled_images: such images have the soft term of distill only, and "
                "there is none; set 0, or distill with a soft weight above 0"
            )
        if timed := self.run.profile_steps:
            needed = PROFILE_WARM_UP + timed + min(timed, PROFILE_TRACED)
            if needed > self.total_steps > 0:
                yield (
                    f"run.profile_steps: {timed} needs a run of {needed} steps, this one has "
                    f"{self.total_steps}; lower it"
                )
        if (recalibrated := self.run.recalibrate_images) % n:
            yield (
                f"run.recalibrate_images: {recalibrated} is not a multiple of recipe.worker_batch "
                f"{n}; take {recalibrated // n * n} or {(recalibrated // n + 1) * n}"
            )
        if recalibrated > self.images:
            yield (
                f"run.recalibrate_images: {recalibrated} is more than the {self.images} training "
                "images; lower it"
            )
        if micro_batch != "auto" and micro_batch % n:
            yield f"run.micro_batch: {micro_batch} is not a multiple of recipe.worker_batch {n}"
        if self.run.noise_scale_every and self.workers == 1:
            yield (
                "run.noise_scale_every: compares workers with the minibatch, which is a single "
                "worker here; lower recipe.worker_batch, or set 0"
            )
        if self.workers % unit:
            yield f"run.unit_workers: {unit} does not divide the {self.workers} workers; lower it"
        if self.run.sums == "exact" and micro_batch not in ("auto", unit * n):
            yield (
                f"run.micro_batch: {micro_batch}, but a pass of exact sums is a unit of {unit * n} "
                "images; remove it, or set run.sums=fast"
            )

    @model_validator(mode="after")
    def _check(self) -> Config:
        if problems := list(self.problems()):
            raise ValueError("\n".join(problems))
        return self
