"""Loaders that turn a batch plan into batches."""
