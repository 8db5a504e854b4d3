"""The section `distill` of the config: the teacher of a student's run, and the student's loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from harness.config.run_section import Precision
from harness.config.section import Fraction, Section, Text, key

# Between these the soft loss is finite in float32 for all logits that float16 can hold: the
# largest, T · 2 · 65504 per image, is 1.3e8 at T = 1000. A larger T would round the gradient,
# since the softened logits of the classes would differ by less than float32 resolves.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 1000.0


class DistillConfig(Section):
    """The teacher of a student's run."""

    teacher: Text = key(
        "The teacher: a config, which is trained first, a run folder, or a state dict."
    )
    teacher_model: Text | None = key(
        "Name of the teacher's network, where `teacher` is a state dict.", None
    )
    temperature: Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)] = key(
        "Temperature T that softens the logits of teacher and student.", 4.0
    )
    hard_weight: Fraction = key("Weight of the cross entropy with the labels.", 0.1)
    soft_weight: Annotated[float, Field(ge=0, le=1e6)] | None = key(
        "Weight of T² times the cross entropy with the soft targets; null is 1 - hard_weight.",
        None,
    )
    precision: Precision = key("Number format of the teacher's forward pass.", "bfloat16")
    cache: Text | None = key(
        "Folder of soft targets written by `harness cache CONFIG --epochs E`.", None
    )

    @property
    def teacher_config(self) -> str | None:
        """Path of the teacher's config; None where `teacher` is a run folder or a state dict."""
        return self.teacher if self.teacher.endswith((".yaml", ".yml")) else None

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the hard and the soft term."""
        soft = 1.0 - self.hard_weight if self.soft_weight is None else self.soft_weight
        return self.hard_weight, soft

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if not any(self.weights):
            yield "soft_weight: 0, as hard_weight is: no loss is left; raise one of them"
