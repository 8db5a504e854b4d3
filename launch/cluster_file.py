"""The cluster file: where and how jobs run. It is as strict as a config."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, Strict, ValidationError, model_validator

from harness.config.errors import config_error, explain, format_value
from harness.config.loading import load_config, read_mapping
from harness.config.run_section import RunConfig
from harness.config.schema import Config
from harness.config.section import Count, Positive, Section, Text
from harness.errors import UserError
from harness.resilience.grace import kill_after_s
from launch.records import LOCAL

SET_BY = {  # sbatch's options that the launcher sets, and the key that they come from
    "nodes": "nodes",
    "ntasks": "gpus_per_node",
    "ntasks-per-node": "gpus_per_node",
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus-per-task": "gpus_per_node",
    "gpus-per-socket": "gpus_per_node",
    "ntasks-per-gpu": "gpus_per_node",
    "cpus-per-task": "cpus_per_gpu",
    "cpus-per-gpu": "cpus_per_gpu",
    "mem": "mem_gb",
    "time": "timeout_min",
    "partition": "partition",
    "account": "account",
    "requeue": "requeues",
    "no-requeue": "requeues: 0",
}
LAUNCHERS_OWN = (
    *("array", "dependency", "kill-on-invalid-dep"),
    *("output", "error", "open-mode", "job-name", "wait", "parsable", "quiet", "clusters"),
)
# the ranks take one of these as a request to stop; R and B are sbatch's own
STOP_SIGNAL = re.compile(r"([RB]{1,2}:)?(SIG)?(USR1|USR2|10|12)(@\d+)?")
GPU_GRES = re.compile(r"(?<!\w)gpu(?::[^:,]+)??(?::(\d+))?(?=,|$)")  # gpu, gpu:8, gpu:h100:8
# The harness would take these for torchrun's and ignore SLURM's. With one address and port for all
# jobs, the ranks of several jobs would meet.
RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


def _as_text(value: Any) -> Any:
    """Take a number for text (NCCL_DEBUG_SUBSYS: 1), but not true or false."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Words = Annotated[str, BeforeValidator(_as_text)]
Lines = Annotated[tuple[Text, ...], Strict(False)]


class Whole(Section):
    """A file's keys: impossible combinations are refused when it is read."""

    @model_validator(mode="after")
    def _check(self) -> Whole:
        if problems := list(self.problems()):
            raise ValueError("\n".join(problems))
        return self


class Cluster(Whole):
    """A cluster file. `nodes` is a number, or a range such as 2-4."""

    backend: Text = "slurm"  # or a launcher that an installed package adds (docs/launchers.md)
    folder: Text  # writable from every node
    nodes: Words
    gpus_per_node: Count  # one rank per GPU; h100:8 is short for gpu_type: h100 beside 8
    gpu_type: Text | None = None  # for clusters where GPUs are asked for by type
    cpus_per_gpu: Count
    mem_gb: Positive | None = None  # a node; None: the cluster's default
    timeout_min: Count
    partition: Text | None = None
    account: Text | None = None
    requeues: Annotated[int, Field(ge=0)] = 20
    launcher: Literal["srun", "torchrun"] = "srun"
    freeze: bool = True  # jobs run a copy of the code, made when they are submitted
    preflight: bool = False  # measure the nodes before each start, and name those that fall short
    spares: Annotated[int, Field(ge=0)] = 0  # nodes beyond `nodes`, for those that fall short
    setup: Lines = ()  # lines of shell before the run, on each job's first node
    environment: dict[str, Words] = Field(default={})
    sbatch: dict[str, Any] = Field(default={})  # passed on as they are
    run: RunConfig = RunConfig()

    @model_validator(mode="before")
    @classmethod
    def _split_gpu_type(cls, keys: Any) -> Any:
        kind, _, count = str(keys.get("gpus_per_node")).rpartition(":")
        if kind and count.isdecimal() and keys.get("gpu_type", kind) == kind:
            return {**keys, "gpus_per_node": int(count), "gpu_type": kind}
        return keys

    @property
    def gpus_by_gres(self) -> int | None:
        """The GPUs of a node where `sbatch: {gres: …}` asks for them, else None."""
        found = GPU_GRES.search(str(self.sbatch.get("gres", "")))
        return None if found is None else int(found[1] or 1)

    @property
    def gpus_option(self) -> str:
        """The GPUs of a node as SLURM takes them, with their type where one is given."""
        return f"{self.gpu_type}:{self.gpus_per_node}" if self.gpu_type else f"{self.gpus_per_node}"

    @property
    def min_nodes(self) -> int:
        return int(self.nodes.split("-")[0])

    @property
    def max_nodes(self) -> int:
        return int(self.nodes.split("-")[-1])

    @property
    def ranks(self) -> int:
        """W, the most ranks that a job may get."""
        return self.max_nodes * self.gpus_per_node

    @property
    def asked_nodes(self) -> str:
        """The nodes that a job asks for, its spares included, as sbatch takes them."""
        if not self.spares:
            return self.nodes
        least, most = self.min_nodes + self.spares, self.max_nodes + self.spares
        return f"{least}" if least == most else f"{least}-{most}"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        whole = re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", self.nodes)
        if whole is None or self.min_nodes > self.max_nodes:
            nodes = format_value(self.nodes)
            yield f"nodes: expected a number, or a range such as 2-4, found {nodes}"
        if self.backend == LOCAL:
            yield f"backend: {LOCAL} has no cluster file; run a study without --cluster"
        yield from self._sbatch_problems()

    def _sbatch_problems(self) -> Iterator[str]:
        for key, value in self.sbatch.items():
            option = key.replace("_", "-")
            if option in SET_BY:
                yield f"sbatch.{key}: set by {SET_BY[option]}; write it there"
            elif option in LAUNCHERS_OWN:
                yield f"sbatch.{key}: set by the launcher; remove it"
            elif value is not True and not isinstance(_as_text(value), str):
                yield f"sbatch.{key}: expected text, a number or true, found {format_value(value)}"
            elif option == "signal" and STOP_SIGNAL.fullmatch(str(value)) is None:
                yield (
                    f"sbatch.{key}: the ranks stop at USR1 or USR2; write USR2@300, "
                    f"found {format_value(value)}"
                )
            elif option in ("mem-per-cpu", "mem-per-gpu") and self.mem_gb is not None:
                yield f"sbatch.{key}: mem_gb asks for memory, too; remove one of them"
        by_gres = self.gpus_by_gres
        if by_gres is not None and self.gpu_type is not None:
            yield "sbatch.gres: gpus_per_node names a type of GPU, too; remove one of them"
        elif by_gres is not None and by_gres != self.gpus_per_node:
            yield f"sbatch.gres: asks for {by_gres} GPUs, but gpus_per_node is {self.gpus_per_node}"


def load_cluster(path: str | Path, nodes: str | None = None) -> Cluster:
    """Read a cluster file; `nodes` replaces the file's. Raises ConfigError."""
    mapping = read_mapping(path)
    if nodes is not None:
        mapping["nodes"] = nodes
    run_keys = [f"run.{key}" for key in RunConfig.model_fields]
    source = str(path) if nodes is None else f"{path} + --nodes"
    return validate(Cluster, mapping, source, [*Cluster.model_fields, *run_keys])


def with_cluster(cluster: Cluster, path: str, cli_overrides: Sequence[str]) -> Config:
    """Return the config at `path` with the cluster file's `run:` keys, then the overrides."""
    keys = {override.partition("=")[0] for override in cli_overrides}
    run = cluster.run.model_dump(mode="json", exclude_unset=True)
    added = {f"run.{key}": value for key, value in run.items()}
    if load_config(path).run.loader_threads == "auto":  # srun's tasks see their own cores only
        added.setdefault("run.loader_threads", cluster.cpus_per_gpu)
    overrides = [f"{key}={json.dumps(value)}" for key, value in added.items() if key not in keys]
    return load_config(path, [*overrides, *cli_overrides])


AnySection = TypeVar("AnySection", bound=Section)


def validate(
    kind: type[AnySection], mapping: Mapping[str, Any], source: str, known: Sequence[str]
) -> AnySection:
    """Return `mapping` as a `kind`. Raises ConfigError, which names `source` and the key."""
    try:
        return kind.model_validate(mapping)
    except ValidationError as error:
        raise config_error(source, explain(error, known)) from None


def check_environment(
    cluster: Cluster, path: str | Path, inherited: Mapping[str, str] = os.environ
) -> None:
    """Raise UserError where a variable that jobs inherit from this shell contradicts the file.

    Also where the grace time that they would have is none.
    """
    for name in RANK_VARIABLES:
        if name in inherited:
            raise UserError(f"{name} is set here and jobs would inherit it: unset {name}")
    kill_after_s({**cluster.environment, **inherited})
    for name, value in cluster.environment.items():
        if inherited.get(name, value) != value:
            raise UserError(
                f"{path}: environment.{name}: {value}, but here it is {inherited[name]}, and jobs "
                f"would inherit that: unset {name}, or change the file"
            )
