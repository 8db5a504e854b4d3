"""Stop requests, hung ranks, and how a run ends."""
