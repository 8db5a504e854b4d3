"""Uses of a trained network: evaluation on any images, prediction, export."""
