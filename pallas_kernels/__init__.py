"""Pallas kernels for TPU and GPU. This package imports jax only and is usable on its own."""
