"""The task of jobs that were submitted before it moved: their pickles name this module."""

from launch.slurm.job_step import Task

__all__ = ["Task"]
