"""RWKV-X in JAX/Flax: RWKV-7 blocks interleaved with top-k chunk sparse attention."""
