"""Runs `harness train` on a SLURM cluster: python -m launch submit | status | study."""
