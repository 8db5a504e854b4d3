"""Loggers: what a run's events and scalars are written to."""
