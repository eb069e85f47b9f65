"""Models shaped like published hybrids, of any size: the same mixers, attention and ratio.

None of them has the mixture of experts of its original; channel mixes are RWKV's, and so are norms.
What else differs is in each docstring. Attention has no position encoding but in `zamba_like`.
"""

from __future__ import annotations

import dataclasses

from rwkvx_jax.config.mixers import MixerName
from rwkvx_jax.config.model import ModelConfig


def jamba_like(groups: int = 4, width: int = 2048, head_size: int = 64) -> ModelConfig:
    """Jamba (arXiv 2403.19887): one full attention block for seven recurrent ones.

    As there: the ratio, and attention without positions. Not as there: Mamba-2 instead of Mamba-1,
    attention after its group instead of inside it, one head of keys and values for each of queries.
    """
    return _hybrid("mamba2", 7, groups, width, head_size)


def minimax_like(groups: int = 4, width: int = 2048, head_size: int = 64) -> ModelConfig:
    """MiniMax-01 (arXiv 2501.08313): lightning attention and full attention, seven to one.

    As there: the ratio, decays and gate of lightning attention. Not as there: rotary positions in
    the full attention, shared keys and values, and the scaled residual stream.
    """
    return _hybrid("lightning", 7, groups, width, head_size)


def qwen3next_like(groups: int = 4, width: int = 2048, head_size: int = 64) -> ModelConfig:
    """Qwen3-Next: Gated DeltaNet and full attention, three to one.

    As there: the ratio and the recurrence with its convolution, norms and gate. Not as there: two
    value heads for each key head, and the gate, norms and partial rotary positions of attention.
    """
    return _hybrid("gated_deltanet", 3, groups, width, head_size)


def kimi_like(groups: int = 4, width: int = 2048, head_size: int = 64) -> ModelConfig:
    """Kimi Linear (arXiv 2510.26692): KDA and full attention without positions, three to one.

    As there: the ratio, the recurrence with its bounded gate, attention without positions. Not as
    there: latent keys and values in the attention.
    """
    return _hybrid("kda", 3, groups, width, head_size)


def zamba_like(groups: int = 4, width: int = 2048, head_size: int = 64) -> ModelConfig:
    """Zamba (arXiv 2405.16712) and Zamba2 (arXiv 2411.15242): six Mamba-2 blocks to each use of one
    shared block of full attention.

    As there: the ratio, one set of parameters for all uses of attention and its MLP, each use with
    its own keys and values, rotary positions (Zamba2). Not as there: the shared block reads the
    residual stream alone, not beside the embedding in twice the width, and its output goes back
    into the stream without a matrix for each use; there are no low-rank adapters of each use, and
    one shared block, not two as in Zamba2; the Mamba-2 blocks have an RWKV channel mix, which they
    have not there.
    """
    hybrid = _hybrid("mamba2", 6, groups, width, head_size)
    return dataclasses.replace(hybrid, shared_attention=True, rope_theta=10_000.0)


def _hybrid(mixer: MixerName, ratio: int, groups: int, width: int, head_size: int) -> ModelConfig:
    return ModelConfig(
        mixer=mixer,
        num_blocks=ratio * groups,
        num_attention_blocks=groups,
        attention="full",
        width=width,
        head_size=head_size,
    )
