"""The config: a YAML file read into a typed, frozen, strict tree.

Everything outside `run:` fixes the training curve; `run:` is the machine. A config refuses, it
never corrects itself: every mistake is a ConfigError of one line that names file and key.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
    model_validator,
)

# Numbers beyond these mean nothing here, and would overflow the integers and floats of PyTorch
LARGEST_COUNT, LARGEST_SIDE, LARGEST_FLOAT32 = 2**31 - 1, 2**15, 3.4e38
# Within these the soft loss is finite in float32 for all logits that float16 can hold: its largest,
# T · 2 · 65504 an image, is 1.3e8 at T = 1000. A larger T rounds the gradient, as the softened
# logits of the classes come nearer to each other than float32 resolves.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 1000.0

Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
# YAML has lists only, so these tuples take them; their items stay strict
Areas = Annotated[tuple[Positive, Positive], Strict(False)]
Ratio = Annotated[float, Field(ge=0.001, le=1000)]  # width to height
Ratios = Annotated[tuple[Ratio, Ratio], Strict(False)]
# of pixels from 0 to 1: figures for pixels from 0 to 255 are refused
Colour = Annotated[tuple[Fraction, Fraction, Fraction], Strict(False)]
Deviation = Annotated[float, Field(ge=0.001, le=1)]
ColourScale = Annotated[tuple[Deviation, Deviation, Deviation], Strict(False)]
Epochs = Annotated[tuple[Count, ...], Strict(False)]
Precision = Literal["float32", "tf32", "bfloat16", "float16", "float64"]

# steps of run.profile_steps: before those that are timed, and traced after them at most
PROFILE_WARM_UP, PROFILE_TRACED = 5, 3
NO_EXPECTATION = "no expectation for this recipe"
SMALL_RESNETS = ("resnet8", "resnet20", "resnet32", "resnet56")


class Section(BaseModel):
    """A frozen group of keys; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def meaningless(self) -> dict[str, str]:
        """Keys that another value makes meaningless, and that value: they may not be written."""
        return {}

    def problems(self) -> Iterator[str]:
        """Impossible combinations, each as `key: what is wrong; what to change`."""
        for key, reason in self.meaningless().items():
            if key in self.model_fields_set:
                yield f"{key}: has no meaning with {reason}; remove it"

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # what is dumped can be loaded: meaningless keys are left out and take their defaults
        return {key: value for key, value in handler(self).items() if key not in self.meaningless()}


class ExpectConfig(Section):
    """The error to be met, in %, with its spread and where the figure comes from."""

    error: Annotated[float, Field(ge=0, le=100)]
    std: NotNegative | None = None  # over `runs`, n - 1; a verdict needs both
    runs: Count | None = None
    source: Text

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.std is not None and self.runs == 1:
            yield "std: one run has none; remove it, or give the runs that it is over"

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.2f}"
        runs = "" if self.runs is None else f"{self.runs} run{'s' * (self.runs != 1)}, "
        return f"{self.error:.2f}{spread} % ({runs}{self.source})"


class DataConfig(Section):
    """The images, and how a crop is made of one. Sizes in pixels."""

    train_images: Count  # checked against the index; lets the dry run work without data
    val_images: Count
    classes: Annotated[int, Field(ge=1, le=2**20)]
    unlabelled_images: CountOrZero = 0
    crop: Annotated[int, Field(ge=1, le=LARGEST_SIDE)] = 224
    # short side at evaluation: by default as 256 is to a crop of 224 (section 5.1)
    resize: Annotated[int, Field(ge=1, le=2 * LARGEST_SIDE)] = Field(
        default_factory=lambda data: round(data["crop"] * 256 / 224)
    )
    crop_area: Areas = (0.08, 1.0)
    crop_ratio: Ratios = (0.75, 1.3333333333333333)
    flip: bool = True
    mean: Colour = (0.485, 0.456, 0.406)
    std: ColourScale = (0.229, 0.224, 0.225)
    on_bad_image: Literal["fail", "skip"] = "fail"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.crop > self.resize:
            yield f"crop: {self.crop} is larger than resize {self.resize}; lower it or raise resize"
        if not self.crop_area[0] <= self.crop_area[1] <= 1:
            yield f"crop_area: expected low <= high <= 1, found {[*self.crop_area]}"
        if self.crop_ratio[0] > self.crop_ratio[1]:
            yield f"crop_ratio: expected low <= high, found {[*self.crop_ratio]}"


class ModelConfig(Section):
    """The network and its initialization."""

    name: Text
    last_gamma: Annotated[int, Field(ge=0, le=1)] = 0  # table 2b
    weights: Text | None = None  # start from a state dict (fine-tuning)
    width: Annotated[int, Field(ge=1, le=1024)] = 16  # small ResNets only

    def meaningless(self) -> dict[str, str]:
        small = self.name in SMALL_RESNETS
        return {} if small else {"width": f"name: {self.name} ({', '.join(SMALL_RESNETS)} have it)"}


class RecipeConfig(Section):
    """The paper's recipe: minibatch, learning rate, momentum, decay."""

    minibatch: Count  # kn
    worker_batch: Count = 32  # n
    epochs: Count
    reference_lr: Positive = 0.1  # at reference_minibatch
    reference_minibatch: Count = 256
    scaling: Literal["linear", "sqrt", "none"] = "linear"
    warmup: Literal["gradual", "constant", "none"] = "gradual"
    warmup_epochs: Count = 5
    decay: Literal["steps", "cosine"] = "steps"
    milestones: Epochs = (30, 60, 80)
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST_FLOAT32)] = 0.0001  # not on batch norm
    label_smoothing: Fraction = 0.0

    def meaningless(self) -> dict[str, str]:
        keys = dict.fromkeys(("milestones", "decay_factor"), "decay: cosine")
        keys = keys if self.decay == "cosine" else {}
        return {**keys, "warmup_epochs": "warmup: none"} if self.warmup == "none" else keys

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        kn, n = self.minibatch, self.worker_batch
        if kn % n:
            nearest = " or ".join(str(m) for m in (kn // n * n, (kn // n + 1) * n) if m)
            yield f"minibatch: {kn} is not a multiple of worker_batch {n}; take {nearest}"
        if self.nesterov and self.momentum == 0:
            yield "nesterov: needs a momentum above 0; set nesterov: false or raise momentum"
        if self.reference_lr * max(kn / self.reference_minibatch, 1) > LARGEST_FLOAT32:
            yield f"reference_lr: {self.reference_lr:g}, scaled, is no float32 number; lower it"
        if self._warmup_end() > self.epochs:
            yield (
                f"warmup_epochs: {self.warmup_epochs} is past the end (epochs: {self.epochs}); "
                "lower warmup_epochs or raise epochs"
            )
        if self.decay == "steps":
            yield from self._milestone_problems()

    def _warmup_end(self) -> int:
        """Epoch at which the warm-up ends; 0 without one, as where the peak is not above the
        reference lr, that is where nothing is scaled up."""
        scaled_up = self.scaling != "none" and self.minibatch > self.reference_minibatch
        return self.warmup_epochs if scaled_up and self.warmup != "none" else 0

    def _milestone_problems(self) -> Iterator[str]:
        start, end = self._warmup_end(), self.epochs
        if early := [m for m in self.milestones if m < start]:
            yield f"milestones: {early} inside the warm-up; take epochs from {start} on"
        if late := [m for m in self.milestones if m >= end]:
            yield f"milestones: {late} past the end (epochs: {end}); take epochs below {end}"
        if list(self.milestones) != sorted(set(self.milestones)):
            yield f"milestones: {[*self.milestones]} must rise from one to the next; sort them"


class DistillConfig(Section):
    """The teacher of a student's run."""

    teacher: Text  # a config, a run folder, or a state dict
    teacher_model: Text | None = None  # name, for a bare state dict
    temperature: Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)] = 4.0
    hard_weight: Fraction = 0.1
    soft_weight: Annotated[float, Field(ge=0, le=1e6)] | None = None  # None: 1 - hard_weight
    precision: Precision = "bfloat16"  # the teacher's
    cache: Text | None = None  # folder written by `harness cache CONFIG --epochs E`

    @property
    def teacher_config(self) -> str | None:
        """The teacher's config, where `teacher` is one and no run folder or state dict."""
        return self.teacher if self.teacher.endswith((".yaml", ".yml")) else None

    @property
    def weights(self) -> tuple[float, float]:
        """Of the hard and of the soft term."""
        soft = 1.0 - self.hard_weight if self.soft_weight is None else self.soft_weight
        return self.hard_weight, soft

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not any(self.weights):
            yield "soft_weight: 0, as hard_weight is: no loss is left; raise one of them"


class RunConfig(Section):
    """The machine: may change on resume, and changes no curve but by rounding."""

    data_root: Text = "data/imagenet"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Precision = "float32"
    micro_batch: Count | Literal["auto"] = "auto"  # images that a rank pushes at once
    compile: bool | Literal["auto"] = "auto"
    gradient_precision: Literal["float32", "bfloat16"] = "float32"
    loader: Literal["auto", "dali", "reference", "memory"] = "auto"
    loader_threads: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    evaluate_every_epochs: Count = 1
    log_every_steps: Count = 20
    checkpoint_every_minutes: Positive = 10.0  # and at every epoch's end
    keep_checkpoints: Count = 3  # and the best
    hang_timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 300.0
    profile_steps: CountOrZero = 0


class Config(Section):
    """A whole config, checked; the sections and keys are those of the YAML file."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1
    expect: ExpectConfig | None = None
    data: DataConfig
    model: ModelConfig
    recipe: RecipeConfig
    distill: DistillConfig | None = None
    run: RunConfig = RunConfig()

    @property
    def workers(self) -> int:
        """k, the paper's workers of n = recipe.worker_batch images each."""
        return self.recipe.minibatch // self.recipe.worker_batch

    @property
    def images(self) -> int:
        """N, the images of an epoch."""
        return self.data.train_images + self.data.unlabelled_images

    @property
    def steps_per_epoch(self) -> int:
        """floor(N / kn): the last N mod kn places of an epoch's shuffling are not used."""
        return self.images // self.recipe.minibatch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.recipe.epochs

    def problems(self) -> Iterator[str]:
        for name in type(self).model_fields:
            if isinstance(section := getattr(self, name), Section):
                yield from (f"{name}.{problem}" for problem in section.problems())
        kn, n, micro_batch = self.recipe.minibatch, self.recipe.worker_batch, self.run.micro_batch
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
        if micro_batch != "auto" and micro_batch % n:
            yield f"run.micro_batch: {micro_batch} is not a multiple of recipe.worker_batch {n}"

    @model_validator(mode="after")
    def _check(self) -> Config:
        if problems := list(self.problems()):
            raise ValueError("\n".join(problems))
        return self
