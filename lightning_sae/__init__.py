"""Sparse autoencoders on transformer activations, as PyTorch Lightning modules."""

__version__ = "0.1.0"
