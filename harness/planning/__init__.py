"""The dry run, and predictions of step time and run time."""
