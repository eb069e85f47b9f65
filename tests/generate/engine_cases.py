"""A tiny engine, for tests and for benchmarks/endurance.py."""

import numpy as np

from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.requests import Request
from rwkvx_jax.generate.sampling import Sampling
from rwkvx_jax.model import abstract_model, with_params
from tests.model_cases import random_params

# The recurrence that compiles fastest.
FLOAT32 = RunConfig(compute_dtype="float32", recurrence="sequential")
CONFIG = ModelConfig(
    vocab_size=40,
    num_blocks=1,
    num_attention_blocks=1,
    width=32,
    head_size=16,
    chunk_size=8,
    top_k=2,
    low_rank_override=(5, 6, 7, 9),
)
DRAWN = Sampling(0.9, 0.9, 0, 0.4, 0.3, 0.9)
LONGEST = 48


def make_engine(batch: int, **options) -> Engine:
    """One whose every parameter counts."""
    model = with_params(abstract_model(CONFIG, FLOAT32), random_params(CONFIG))
    return Engine(
        model, **{"max_length": LONGEST, "batch": batch, "piece": 16, "sampling": DRAWN} | options
    )


def draw_requests(count, seed=0, longest=LONGEST):
    """Prompts from one token to a full cache, stops that some reach, limits from none on."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        prompt = rng.integers(1, 40, rng.integers(1, longest + 1))
        stop = tuple(int(t) for t in rng.integers(0, 40, rng.integers(0, 3)))
        yield Request(prompt.tolist(), int(rng.integers(0, 20)), stop, seed=number)
