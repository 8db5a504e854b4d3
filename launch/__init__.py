"""Runs `harness train`, on a SLURM cluster or here: python -m launch submit | status | study."""
