"""The installed packages whose code a config uses."""

from __future__ import annotations

from importlib.metadata import EntryPoint

from harness.config.schema import OPTIMIZER_KEYS, Config
from harness.data.sources.registry import BUILT_IN
from harness.data.sources.registry import GROUP as DATA_FORMATS
from harness.installed import installed
from harness.models.registry import entry_point as network_entry_point
from harness.recipe.optimizer import GROUP as OPTIMIZERS
from harness.runs.logging.installed import GROUP as LOGGERS


def modules_behind_results(config: Config) -> tuple[str, ...]:
    """Return the top-level modules of the packages that a result of `config` depends on.

    They add its network, its teacher's network where the config names it, its optimizer and its
    data format. Raises UserError for a package that cannot be used.
    """
    names = [config.model.name]
    if config.distill is not None and config.distill.teacher_model is not None:
        names.append(config.distill.teacher_model)
    points = [*map(network_entry_point, names)]
    if config.recipe.optimizer not in OPTIMIZER_KEYS:
        points.append(installed(OPTIMIZERS).get(config.recipe.optimizer))
    if config.run.data_format not in BUILT_IN:
        points.append(installed(DATA_FORMATS).get(config.run.data_format))
    return _modules(points)


def all_modules(config: Config) -> tuple[str, ...]:
    """Return the modules behind the results, and those of the config's loggers."""
    loggers = installed(LOGGERS) if config.run.loggers else {}
    points = [loggers.get(name) for name in config.run.loggers]
    return tuple(sorted({*modules_behind_results(config), *_modules(points)}))


def _modules(points: list[EntryPoint | None]) -> tuple[str, ...]:
    return tuple(sorted({point.module.partition(".")[0] for point in points if point}))
