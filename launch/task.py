"""The former home of the task that jobs carry: one submitted before still unpickles from here."""

from launch.slurm.job_step import Task

__all__ = ["Task"]
