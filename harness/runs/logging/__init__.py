"""Where a run's events and scalars go."""
