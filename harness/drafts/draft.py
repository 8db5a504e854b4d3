"""A draft of a config: its values with comments, as YAML text for a person to complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from harness.config.loading import config_from_mapping
from harness.config.schema import Config
from harness.config.yaml import write_yaml
from harness.recipe.schedule import lr_at, peak_lr

COLUMN = 28  # of the comments behind values


@dataclass(frozen=True)
class Draft:
    """A config in the making.

    Attributes:
        title: The first line of the head.
        values: Section -> key -> value.
        comments: Dotted key -> the comment behind its value.
        notes: Further lines of the head.
        hints: Section -> lines of YAML that are commented out.

    """

    title: str
    values: Mapping[str, Mapping[str, object]]
    comments: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hints: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The config that the text says. Raises ConfigError where its values do not fit."""
        mapping: dict[str, object] = {name: dict(keys) for name, keys in self.values.items()}
        return config_from_mapping(mapping, "draft")

    def render(self, ranks: int | None = None) -> str:
        """Return the text, with its arithmetic in the head. Raises ConfigError."""
        head = [self.title, *arithmetic(self.config, ranks), *self.notes]
        lines = [f"# {line}".rstrip() for line in head]
        for section, keys in self.values.items():
            if not keys:
                continue
            lines.append(f"{section}:")
            for key, value in keys.items():
                text = "  " + write_yaml({key: value}).rstrip("\n")
                comment = self.comments.get(f"{section}.{key}")
                lines.append(f"{text:{COLUMN}} # {comment}" if comment else text)
            lines += [f"  # {hint}" for hint in self.hints.get(section, ())]
        return "\n".join(lines) + "\n"


def arithmetic(config: Config, ranks: int | None) -> Iterator[str]:
    """Yield lines on workers, learning rates, steps and ranks, with the numbers they come from."""
    recipe, k, n = config.recipe, config.workers, config.recipe.worker_batch
    kn, steps = recipe.minibatch, config.steps_per_epoch
    warm = config.warmup_steps
    yield (
        f"k = {kn}/{n} = {k}; peak lr {recipe.reference_lr:g} * {kn}/"
        f"{recipe.reference_minibatch} = {peak_lr(recipe):.4g}"
        + ("" if warm else ", no warm-up, as it is not above the reference")
    )
    yield (
        f"floor({config.images}/{kn}) = {steps} steps per epoch, {steps} * {recipe.epochs} = "
        f"{config.total_steps} in all"
    )
    falls = [f"warm-up over steps 0 to {warm}"] if warm else []
    if recipe.decay == "steps":
        places = [epoch * steps for epoch in recipe.milestones]
        falls += [f"lr {lr_at(config, step):.4g} from step {step}" for step in places]
    else:
        falls.append(f"{recipe.decay} to step {config.total_steps}")
    yield "; ".join(falls)
    if ranks is not None:
        low, rest = divmod(k, ranks)
        share = f"{low} or {low + 1}" if rest else str(low)
        yield f"workers on each of {ranks} ranks: {share}; 1 to {k} ranks give the same curve"
