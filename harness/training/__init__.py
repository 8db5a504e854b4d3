"""Training: the loop, the step, the set-up and the end of a run."""
