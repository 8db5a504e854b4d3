"""Run folders: state, checkpoints, logs, environment."""
