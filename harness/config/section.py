"""A section of the config: its keys, and the facts that each key carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    model_serializer,
)
from pydantic.config import JsonDict

# Numbers beyond these mean nothing here, and would overflow the integers and floats of PyTorch.
LARGEST_COUNT, LARGEST_SIDE, LARGEST_FLOAT32 = 2**31 - 1, 2**15, 3.4e38

Count = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Options = dict[Text, bool | int | float | str]  # of a builder
# YAML has lists only, so tuples accept them; their items stay strict.
AsList = Strict(False)


class Effect(Enum):
    """The effect that changing a key has on a run. Resuming and the report depend on it."""

    CURVE = "curve"
    ROUNDING = "rounding"
    HARDWARE = "hardware"
    EVALUATION = "evaluation"
    SPEED = "speed"
    NONE = "none"

    @property
    def explanation(self) -> str:
        """One sentence for the reference."""
        return EXPLANATIONS[self]


EXPLANATIONS = {
    Effect.CURVE: "It changes the training curve; a resumed run must keep it.",
    Effect.ROUNDING: (
        "It changes results by rounding only; a resumed run changes it only where the command line "
        "says so."
    ),
    Effect.HARDWARE: (
        "It follows the hardware and changes results by rounding only, as the number of ranks "
        "does; a resumed run may change it."
    ),
    Effect.EVALUATION: (
        "It changes the validation errors, not the training; a resumed run changes it only where "
        "the command line says so."
    ),
    Effect.SPEED: "It changes time and memory only; a resumed run may change it.",
    Effect.NONE: "It changes no result of training; a resumed run may change it.",
}


def key(
    description: str,
    default: object = ...,
    *,
    unit: str = "",
    effect: Effect | None = None,
    computed: Callable[[dict[str, int]], object] | None = None,
) -> Any:  # like pydantic's Field, so that the annotation alone gives the key's type
    """Return the field of a config key, required where it has no `default`.

    `description` is one sentence for the reference. `effect` is that of the section where it is
    None. `computed` derives the default from the section's earlier keys.
    """
    facts = {"unit": unit, "effect": effect.value if effect else ""}
    extra: JsonDict = {name: text for name, text in facts.items() if text}
    if computed is not None:
        return Field(default_factory=computed, description=description, json_schema_extra=extra)
    return Field(default, description=description, json_schema_extra=extra)


class Section(BaseModel):
    """A frozen group of keys; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    effect: ClassVar[Effect] = Effect.CURVE  # of the keys that do not state their own

    def meaningless(self) -> dict[str, str]:
        """Return the keys that another value makes meaningless, which may not be written.

        Each comes with that other value, such as `{"milestones": "decay: cosine"}`.
        """
        return {}

    def problems(self) -> Iterator[str]:
        """Yield impossible combinations, each as `key: what is wrong; what to change`."""
        for name, reason in self.meaningless().items():
            if name in self.model_fields_set:
                yield f"{name}: has no meaning with {reason}; remove it"

    @model_serializer(mode="wrap")
    def _dump(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        # Meaningless keys are left out, so that the result can be loaded.
        meaningless = self.meaningless()
        return {name: value for name, value in handler(self).items() if name not in meaningless}
