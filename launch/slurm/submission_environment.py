"""The variables of the shell that submits: what a job must not inherit, and what sbatch obeys."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from harness.errors import UserError

# How commands find the cluster. All other variables of SLURM describe a job: those of an
# interactive one would reach the new job, whose srun would take them for its own size.
CLIENT_SETTINGS = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
# SLURM sets these in a job with GPUs; outside of one they are the user's
VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES")

# SBATCH_MEM_PER_NODE is --mem; other variables are named after their options
OPTIONS = {
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_TIMELIMIT": "time",
}
# an option contradicts the others of its group, too
GROUPS = (
    {"requeue", "no-requeue"},
    {"mem", "mem-per-cpu", "mem-per-gpu"},
    {"gpus", "gpus-per-node", "gpus-per-task", "gres"},
    {"cpus-per-task", "cpus-per-gpu"},
)
NEVER = {  # what the launcher cannot work with, whatever the cluster file contains
    "array": "the launcher decides what is an array",
    "clusters": "the launcher would not find the job again",
    "wait": "the launcher would wait for the job's end",
}


def check_sbatch_variables(script: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raise UserError where a SBATCH_… variable contradicts the script, which it would override."""
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))
    for name in sorted(environment):
        if not name.startswith("SBATCH_"):
            continue
        option, value = OPTIONS.get(name, _option_named(name)), environment[name]
        if option in NEVER:
            raise UserError(f"{name} is set here, and {NEVER[option]}: unset {name}")
        if option in options and (not options[option] or options[option].strip("'") == value):
            continue
        for other in sorted(_rivals(option) & options.keys()):
            theirs = f"--{other}={options[other]}" if options[other] else f"--{other}"
            raise UserError(
                f"{name}={value} is set here and would override the job's {theirs}: unset {name}, "
                "or change the cluster file"
            )


def _option_named(variable: str) -> str:
    return variable.removeprefix("SBATCH_").lower().replace("_", "-")


def _rivals(option: str) -> set[str]:
    return {option}.union(*(group for group in GROUPS if option in group))


@contextmanager
def outside_any_job() -> Iterator[None]:
    """Within, this process has no variables of a SLURM job that it runs in."""
    before = dict(os.environ)
    hidden = [name for name in before if name.startswith(OF_A_JOB) and name not in CLIENT_SETTINGS]
    if "SLURM_JOB_ID" in before:
        hidden += [name for name in VISIBLE_GPUS if name in before]
    try:
        for name in hidden:
            del os.environ[name]
        yield
    finally:
        os.environ.update({name: before[name] for name in hidden})
