"""What each sequence mixer of the recurrent blocks keeps and weighs, in numbers alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

MixerName = Literal[
    "rwkv7", "rwkv6", "rwkv5", "rwkv4", "gated_deltanet", "deltanet", "kda", "mamba2", "lightning"
]

CONV = 4
"""Taps of the short convolutions of Mamba-2, Gated DeltaNet, DeltaNet and KDA."""

MIX_RANK, DECAY_RANK = 32, 64
"""Low-rank widths of RWKV-6's token shift and decay."""


class MixerSizes(NamedTuple):
    """Sizes of one block's mixer.

    Attributes:
      heads: H of the state.
      keys: K of the state: columns, and channels of what reads and addresses it.
      values: V of the state: rows.
      shift: numbers of a token shift or convolution that the next piece of a text needs.
      parameters: numbers in all its arrays.
      scalar: one decay a head, not one a channel.
      delta: it removes what a key finds before it writes.
    """

    heads: int
    keys: int
    values: int
    shift: int
    parameters: int
    scalar: bool
    delta: bool


def mixer_sizes(name: MixerName, width: int, head_size: int, ranks: tuple[int, ...]) -> MixerSizes:
    """The sizes of a mixer at model width D with heads of `head_size`.

    Args:
      name: of the mixer.
      width: D.
      head_size: K = V, of Mamba-2 V, whose K is twice that.
      ranks: low-rank widths of RWKV-7.
    """
    heads, square, norm = width // head_size, width * width, 2 * width
    if name == "rwkv7":
        count = 4 * square + 12 * width + norm + 2 * width * sum(ranks)
        return MixerSizes(heads, head_size, head_size, width, count, scalar=False, delta=True)
    if name == "rwkv6":
        count = 5 * square + 6 * width + 2 * 5 * width * MIX_RANK + 2 * width * DECAY_RANK
        count += 2 * width + norm
        return MixerSizes(heads, head_size, head_size, width, count, scalar=False, delta=False)
    if name == "rwkv5":
        count = 5 * square + 6 * width + norm
        return MixerSizes(heads, head_size, head_size, width, count, scalar=False, delta=False)
    if name == "rwkv4":
        count = 4 * square + 5 * width
        return MixerSizes(1, width, 3, width, count, scalar=False, delta=False)
    if name in ("gated_deltanet", "deltanet"):
        count = 5 * square + CONV * 3 * width + width * heads + head_size
        count += (width + 2) * heads if name == "gated_deltanet" else 0
        shift = (CONV - 1) * 3 * width
        return MixerSizes(heads, head_size, head_size, shift, count, scalar=True, delta=True)
    if name == "kda":
        count = 4 * square + CONV * 3 * width + 4 * width * head_size + width + heads
        count += width * heads + head_size
        shift = (CONV - 1) * 3 * width
        return MixerSizes(heads, head_size, head_size, shift, count, scalar=False, delta=True)
    if name == "mamba2":
        inner, keys = 2 * width, 2 * head_size
        heads, mixed = inner // head_size, inner + 2 * keys
        count = width * (inner + mixed + heads) + (CONV + 1) * mixed + 3 * heads
        count += inner + inner * width
        shift = (CONV - 1) * mixed
        return MixerSizes(heads, keys, head_size, shift, count, scalar=True, delta=False)
    if name == "lightning":
        return MixerSizes(
            heads, head_size, head_size, 0, 5 * square + width + heads, scalar=True, delta=False
        )
    raise AssertionError(name)
