"""A run that is wanted: of a config, in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness.config import Config, curve_differences, load_config
from harness.errors import UserError
from launch.task import read_status


@dataclass(frozen=True)
class Wanted:
    """`name`: within its records; `typed`: the command line's overrides."""

    name: str
    run: Path
    config: Config
    typed: tuple[str, ...] = ()

    def is_finished(self) -> bool:
        """Raises UserError where the run folder holds another config's run."""
        if not (self.run / "config.yaml").exists():
            return False
        if differences := curve_differences(load_config(self.run / "config.yaml"), self.config):
            raise UserError(
                f"{self.run}: was run with another config ({'; '.join(differences)}); "
                "give the same values or choose another --out"
            )
        return read_status(self.run).get("state") == "finished"
