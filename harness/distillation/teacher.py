"""The teacher: a finished network, which returns its logits for the crops of a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.config.loading import default_run_folder
from harness.config.schema import Config, DistillConfig, ModelConfig
from harness.data.batch import Batch
from harness.errors import UserError
from harness.execution.evaluation import Evaluation, evaluate
from harness.execution.precision import autocast, master_dtype, precision_within
from harness.execution.preprocess import Preprocess
from harness.execution.trained_model import TrainedModel, load_trained
from harness.models.registry import build_model
from harness.models.weights import load_weights, weights_digest
from harness.outcome import State, recorded_state
from harness.runs.checkpoint import checkpoint_key
from harness.runs.run_folder import RunFolder


class AnyTeacher(Protocol):
    """The logits of a teacher, from its network or from a cache.

    `identity` distinguishes it from all others: a resumed run must have the same teacher.
    """

    identity: str

    def to(self, device: torch.device) -> None:
        """Move to the device of the batches, once the process group exists."""
        ...

    def __call__(self, step: int, batch: Batch) -> Tensor:
        """Return the logits, float32 (B, K) on the device, for a micro-batch of a step."""
        ...

    def evaluate(self, batches: Callable[[], Iterator[Batch]]) -> Evaluation:
        """Return its own result on the validation set, summed over the ranks."""
        ...


class Teacher:
    """A network in evaluation mode with its own precision, neither trained nor synchronized.

    It sees the same crops as the student, normalized as in its own training. `identity` is the
    SHA-256 of its weights; `settings` holds what else its logits depend on.
    """

    def __init__(self, config: Config, model: nn.Module) -> None:
        """`config` is the student's with the teacher's normalization and precision."""
        self._config = config
        dtype = master_dtype(config.run.precision)
        self.identity = weights_digest(model.state_dict())
        self.settings: dict[str, object] = {
            "precision": config.run.precision,
            "mean": list(config.data.mean),
            "std": list(config.data.std),
        }
        self.network = model.to(dtype).eval().requires_grad_(False)
        self._model: nn.Module = self.network
        self._preprocess = Preprocess(config, torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Move the network to `device`, and compile it where the student is compiled."""
        self.network.to(device)
        if device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)
        if self._config.run.compile is True:
            self._model = torch.compile(self.network)  # type: ignore[assignment]
        self._preprocess = Preprocess(self._config, device)

    @torch.no_grad()
    def __call__(self, step: int, batch: Batch) -> Tensor:
        """Return the logits (B, K), in float32 for any precision, as in a cache."""
        with (
            precision_within(self._config.run.precision),
            autocast(self._config, self._preprocess.device),
        ):
            return self._model(self._preprocess(batch.images)).float()

    def evaluate(self, batches: Callable[[], Iterator[Batch]]) -> Evaluation:
        """Return its result on the validation set, summed over the ranks."""
        with precision_within(self._config.run.precision):
            return evaluate(self._config, self._model, batches(), self._preprocess)


def load_teacher(config: Config, class_names: Sequence[str]) -> Teacher:
    """Load the teacher that `config.distill` names, on the CPU.

    Raises UserError if it is missing, unfinished or damaged, or has other classes.
    """
    distill = config.distill
    assert distill is not None
    trained = _load(config, distill)
    _check_classes(distill.teacher, trained, config, class_names)
    theirs = trained.config.data
    data = config.data.model_copy(update={"mean": theirs.mean, "std": theirs.std})
    run = config.run.model_copy(update={"precision": distill.precision})
    return Teacher(config.model_copy(update={"data": data, "run": run}), trained.model)


def _load(config: Config, distill: DistillConfig) -> TrainedModel:
    path = Path(distill.teacher)
    if distill.teacher_config or path.is_dir():
        if distill.teacher_model is not None:
            raise UserError(
                f"distill.teacher_model: has no meaning with {path}, which names its network; "
                "remove it"
            )
        return _load_run(default_run_folder(path) if distill.teacher_config else path, path)
    if not path.exists():
        raise UserError(
            f"distill.teacher: {path}: not found; give a config, a run folder or a state dict"
        )
    if distill.teacher_model is None:
        raise UserError(
            f"distill.teacher: {path} is a state dict; name its model in distill.teacher_model"
        )
    # A state dict does not record the normalization; take the student's.
    config = config.model_copy(update={"model": ModelConfig(name=distill.teacher_model)})
    model = build_model(config)
    load_weights(model, path, "distill.teacher", "distill.teacher_model, or of other classes")
    return TrainedModel(config, model, path)


def _load_run(folder: Path, named: Path) -> TrainedModel:
    status = RunFolder(folder).read_status()
    if (state := recorded_state(status)) is not State.FINISHED:
        how = "not there" if state is None else state.value
        raise UserError(
            f"distill.teacher: {named}: its run {folder} is {how}, not finished; a student needs "
            "a finished teacher: train it first"
        )
    trained = load_trained(folder, report=lambda text: print(f"warning: {text}", flush=True))
    step = checkpoint_key(trained.checkpoint)[1]
    if step != trained.config.total_steps:
        raise UserError(
            f"distill.teacher: {folder}: its final checkpoint is damaged or missing (the newest "
            f"is of step {step} of {trained.config.total_steps}); train it again"
        )
    return trained


def _check_classes(
    teacher: str, trained: TrainedModel, config: Config, class_names: Sequence[str]
) -> None:
    """Compare the number of classes, and their names where the teacher is a run."""
    theirs, ours = trained.config.data.classes, config.data.classes
    if theirs != ours:
        raise UserError(
            f"distill.teacher: {teacher} has {theirs} classes, data.classes is {ours}; "
            "take a teacher of the same classes"
        )
    for number, (their, our) in enumerate(zip(trained.class_names, class_names, strict=False)):
        if their != our:
            raise UserError(
                f"distill.teacher: {teacher}: its class {number} is {their}, here it is {our}; "
                "take a teacher of the same classes"
            )
