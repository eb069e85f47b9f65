"""A curriculum of a few seconds, for the tests of the train step and the loop."""

import jax
import numpy as np

from rwkvx_jax.config import Config, MeshConfig, ModelConfig, OptimizerConfig, RunConfig, Stage
from rwkvx_jax.sharding import make_mesh

MODEL = ModelConfig(
    vocab_size=257,
    num_blocks=2,
    num_attention_blocks=1,
    width=16,
    head_size=8,
    chunk_size=8,
    top_k=2,
    low_rank_override=(4, 4, 4, 4),
)
RUN = RunConfig(
    compute_dtype="float32",
    remat="none",
    recurrence="sequential",
    log_every=1,
    eval_batches=1,
    checkpoint_every=3,
)
STAGES = (
    Stage("rwkv7", 24, 8, 4, 1e-2, expanded=False, warmup_steps=2),
    Stage("preheat", 24, 8, 3, 1e-2, trainable="attention"),
    Stage("grow", 40, 8, 4, 1e-2, schedule="cosine"),
)
CURRICULUM = Config(
    MODEL, STAGES, optimizer=OptimizerConfig(policy="rwkv_lm"), run=RUN, mesh=MeshConfig()
)
STEPS = sum(stage.steps for stage in STAGES)


def one_device_mesh():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def random_batch(rows, time, seed=0):
    """Tokens and a mask whose rows count differently many targets, one of them none."""
    rng = np.random.default_rng(seed)
    mask = (rng.uniform(size=(rows, time)) < rng.uniform(0.2, 1, (rows, 1))).astype(np.float32)
    mask[1] = 0
    return {"tokens": rng.integers(0, 257, (rows, time + 1)).astype(np.int32), "mask": mask}


def random_segments(rows, time, seed=0):
    """Ids of documents of a few tokens each; rows end in padding of different lengths."""
    rng = np.random.default_rng(seed)
    ids = 1 + np.cumsum(rng.uniform(size=(rows, time)) < 0.2, axis=1)
    padded = np.arange(time) >= time - rng.integers(0, time // 2, (rows, 1))
    return np.where(padded, 0, ids - ids[:, :1] + 1).astype(np.int32)


def same_bits(first, second) -> bool:
    """Whether two parameter trees are equal to the last bit."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
