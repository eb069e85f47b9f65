"""Transformers by their names: what the paper's RWKV-X models are compared with.

The options are those of the published config.json files; `convert` reads their weights. For a
baseline of another size use `dataclasses.replace`, or `ModelConfig` itself.
"""

from __future__ import annotations

from rwkvx_jax.config.model import ModelConfig


def llama32_3b() -> ModelConfig:
    """Llama-3.2-3B (arXiv 2407.21783): 3.21 B parameters."""
    return ModelConfig(
        vocab_size=128_256,
        num_blocks=0,
        num_attention_blocks=28,
        backbone="llama",
        tied_embeddings=True,
        width=3072,
        head_size=128,
        ffn_width=8192,
        attention="full",
        num_kv_heads=8,
        rope_theta=500_000.0,
        rope_scaling=(32.0, 1.0, 4.0, 8192.0),
    )


def qwen25_3b() -> ModelConfig:
    """Qwen2.5-3B (arXiv 2412.15115): 3.09 B parameters."""
    return ModelConfig(
        vocab_size=151_936,
        num_blocks=0,
        num_attention_blocks=36,
        backbone="llama",
        norm_eps=1e-6,
        tied_embeddings=True,
        width=2048,
        head_size=128,
        ffn_width=11_008,
        attention="full",
        num_kv_heads=2,
        qkv_bias=True,
        rope_theta=1_000_000.0,
    )
