"""Choices measured before the first step: micro-batch size, CUDA graphs, malloc."""
