"""Teachers, cached logits, and runs in stages."""
