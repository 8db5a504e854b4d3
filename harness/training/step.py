"""One optimizer step: micro-batches, the loss, the update."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from torch import Tensor

from harness.compat import found_overflow
from harness.config.schema import Config
from harness.data.batch import Batch
from harness.models.registry import optimizer_of
from harness.recipe.optimizer import set_lr
from harness.recipe.schedule import lr_at
from harness.resilience.step_observer import StepPhase
from harness.training.metrics import Metrics
from harness.training.noise_probe import NoiseProbe
from harness.training.objective import Objective, build_objective
from harness.training.replica import Replica


class Step:
    """Runs this rank's optimizer steps on its replica of the network.

    `micro_batches` are the workers of each of the rank's micro-batches. `objective` is what is
    minimised; plain training needs none. The replica's observers follow each step.
    """

    def __init__(
        self,
        config: Config,
        replica: Replica,
        micro_batches: Sequence[range],
        objective: Objective | None = None,
    ) -> None:
        self.config, self.replica, self.device = config, replica, replica.device
        self.network = replica.network
        self.micro_batches = len(micro_batches)
        self.local_workers = sum(map(len, micro_batches))
        self.objective = objective or build_objective(config, None)
        self.optimizer = optimizer_of(self.network, config)
        self.metrics = Metrics(self.device, config.recipe.minibatch)
        self.noise = NoiseProbe(config, replica, self.objective)
        self._data_wait_s = 0.0
        self._replaced: list[tuple[int, int, int]] = []

    def __call__(self, step: int, batches: Iterator[Batch]) -> None:
        """Update the weights with this rank's next micro-batches; never wait for the device."""
        replica = self.replica
        set_lr(self.optimizer, lr_at(self.config, step))
        measured: list[Batch] | None = [] if self.noise.is_due(step) else None
        for number in range(self.micro_batches):
            self._enter("data wait")
            waited_from_s = time.perf_counter()
            batch = next(batches)
            self._data_wait_s += time.perf_counter() - waited_from_s
            self._replaced += [(step, bad, other) for bad, other in batch.replaced]
            with replica.sums.of_pass(is_last=number == self.micro_batches - 1):
                self._forward_backward(step, batch)
            if measured is not None:
                measured.append(batch)
        self._enter("optimizer")
        replica.sums.finish(step)
        replica.sums.update_running_statistics(self.local_workers)
        if measured is not None:
            self.noise.measure(step, measured)
        replica.scaler.step(self.optimizer)
        self.metrics.end_step(step, self._overflow())
        replica.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for observer in replica.observers:
            observer.on_step_end()

    def _forward_backward(self, step: int, batch: Batch) -> None:
        self._enter("forward")
        labels = batch.labels.to(self.device, non_blocking=True)
        loss_of = self.objective(step, batch)
        logits = self.replica.logits(batch.images)
        loss = loss_of(logits, labels)
        self._enter("backward")
        self.replica.backward(loss.minimised)
        self._enter("metrics")
        self.metrics.add_micro_batch(loss.minimised, logits, labels, loss.kl)

    def _enter(self, phase: StepPhase) -> None:
        for observer in self.replica.observers:
            observer.on_phase(phase)

    def _overflow(self) -> Tensor | None:
        """float16: 1.0 on the device where this step's gradients overflowed, else 0.0.

        It is the same on all ranks, as it is seen in the summed gradients.
        """
        scaler = self.replica.scaler
        return found_overflow(scaler, self.optimizer, self.device) if scaler.is_enabled() else None

    def take_data_wait_s(self) -> float:
        """Return the seconds spent waiting for data since the last call."""
        seconds, self._data_wait_s = self._data_wait_s, 0.0
        return seconds

    def take_replaced(self) -> list[tuple[int, int, int]]:
        """Return (step, bad id, id in its place) of the images replaced since the last call."""
        replaced, self._replaced = self._replaced, []
        return replaced

    def state_dict(self) -> dict[str, object]:
        """Model, optimizer and scaler, as a checkpoint holds them."""
        return {
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.replica.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, dict]) -> None:
        """Restore what `state_dict` returned on any number of ranks."""
        self.network.load_state_dict(state["model"], strict=True)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.replica.scaler.is_enabled() and state["scaler"]:
            self.replica.scaler.load_state_dict(state["scaler"])
