"""The dry run, and predictions of step times and run times."""
