"""Choices made before the first step: micro-batch size, CUDA graphs, malloc."""
