"""Flax NNX modules: plain containers of parameters with an ordinary __call__."""
