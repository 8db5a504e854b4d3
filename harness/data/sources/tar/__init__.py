"""Images in tar archives, read where they are: nothing is extracted."""
