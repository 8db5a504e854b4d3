"""The teacher: a finished network, loaded, checked, and asked for the soft targets of a crop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

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
from harness.models.weights import load_weights
from harness.runs.checkpoint import checkpoint_key
from harness.runs.run_folder import RunFolder


class AnyTeacher(Protocol):
    """A teacher's answers, from the network or from a cache.

    `identity` tells it from any other: a run that resumes must find it again.
    """

    identity: str

    def to(self, device: torch.device) -> None:
        """Moves to the device of the batches, once the process group stands."""
        ...

    def __call__(self, step: int, batch: Batch) -> Tensor:
        """The logits, float32 (B, K) on the device, for a micro-batch of a step."""
        ...

    def evaluate(self, batches: Callable[[], Iterator[Batch]]) -> Evaluation:
        """Its own result on the validation set, summed over the ranks."""
        ...


class Teacher:
    """A network in evaluation mode and a precision of its own; nothing of it is trained or synced.

    It sees the very crops that the student sees, normalised as in its own training.
    `identity` is the SHA-256 of its weights, `computes` what else its logits depend on.
    """

    def __init__(self, config: Config, model: nn.Module) -> None:
        """`config`: the student's, but for the teacher's normalisation and precision."""
        self._config = config
        dtype = master_dtype(config.run.precision)
        self.identity = weights_checksum(model)
        self.computes: dict[str, Any] = {
            "precision": config.run.precision,
            "mean": list(config.data.mean),
            "std": list(config.data.std),
        }
        self.network = model.to(dtype).eval().requires_grad_(False)
        self._model: nn.Module = self.network
        self._pixels = Preprocess(config, torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        self.network.to(device)
        if device.type == "cuda":
            self.network.to(memory_format=torch.channels_last)
        if self._config.run.compile is True:
            self._model = torch.compile(self.network)  # type: ignore[assignment]
        self._pixels = Preprocess(self._config, device)

    @torch.no_grad()
    def __call__(self, step: int, batch: Batch) -> Tensor:
        """In float32 whatever the precision, as the cache keeps them."""
        with (
            precision_within(self._config.run.precision),
            autocast(self._config, self._pixels.device),
        ):
            return self._model(self._pixels(batch.images)).float()

    def evaluate(self, batches: Callable[[], Iterator[Batch]]) -> Evaluation:
        with precision_within(self._config.run.precision):
            return evaluate(self._config, self._model, batches(), self._pixels)


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of names, types, shapes and bytes of a state dict on the CPU, in its own order."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        total.update(value.contiguous().numpy().tobytes())
    return total.hexdigest()


def load_teacher(config: Config, class_names: Sequence[str]) -> Teacher:
    """The teacher that `config.distill` names, on the CPU.

    Raises UserError where it is missing, unfinished, damaged, or has other classes.
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
                f"distill.teacher_model: has no meaning with {path}, which names its model; "
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
    # it says nothing of its normalisation: that of the student is taken
    config = config.model_copy(update={"model": ModelConfig(name=distill.teacher_model)})
    model = build_model(config)
    load_weights(model, path, "distill.teacher", "distill.teacher_model, or of other classes")
    return TrainedModel(config, model, path)


def _load_run(folder: Path, named: Path) -> TrainedModel:
    status = RunFolder(folder).read_status()
    if status.get("state") != "finished":
        how = status.get("state", "not there")
        raise UserError(
            f"distill.teacher: {named}: its run {folder} is {how}, not finished; a student starts "
            "from a finished teacher only: train it first"
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
    """The count, and the names where the teacher's are known: runs keep them, state dicts not."""
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
