"""A model small enough for tests of the evaluations."""

import jax
import numpy as np

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.model import abstract_model, get_params

TINY = ModelConfig(
    vocab_size=257,
    num_blocks=2,
    num_attention_blocks=1,
    width=32,
    head_size=16,
    chunk_size=8,
    top_k=2,
)


def random_params(config):
    """Parameters drawn in NumPy: no compilation, and attention matters (fresh models zero it)."""
    rng = np.random.default_rng(0)
    draw = lambda p: (0.3 * rng.standard_normal(p.shape)).astype(np.float32)
    return jax.tree.map(draw, get_params(abstract_model(config)))
