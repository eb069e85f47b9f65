"""What each sequence mixer of the recurrent blocks keeps and weighs, in numbers alone."""

from __future__ import annotations

from typing import Literal, NamedTuple

MixerName = Literal[
    "rwkv7", "rwkv6", "rwkv5", "rwkv4", "gated_deltanet", "deltanet", "kda", "mamba2", "lightning"
]

MIXER_TITLES: dict[MixerName, str] = {
    "rwkv7": "RWKV-7",
    "rwkv6": "RWKV-6",
    "rwkv5": "RWKV-5",
    "rwkv4": "RWKV-4",
    "gated_deltanet": "Gated DeltaNet",
    "deltanet": "DeltaNet",
    "kda": "KDA",
    "mamba2": "Mamba-2",
    "lightning": "Lightning attention",
}
"""Their names for people."""

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
      matrices: numbers in the matrices that each token is multiplied with.
      parameters: numbers in all its arrays.
      scalar: one decay a head, not one a channel.
      delta: it removes what a key finds before it writes.
    """

    heads: int
    keys: int
    values: int
    shift: int
    matrices: int
    parameters: int
    scalar: bool
    delta: bool

    @property
    def state(self) -> int:
        """Numbers in the state of one text."""
        return self.heads * self.keys * self.values


def mixer_sizes(name: MixerName, width: int, head_size: int, ranks: tuple[int, ...]) -> MixerSizes:
    """The sizes of a mixer at model width D with heads of `head_size`.

    Args:
      name: of the mixer.
      width: D.
      head_size: K = V, of Mamba-2 V, whose K is twice that.
      ranks: low-rank widths of RWKV-7.
    """
    heads, square, norm = width // head_size, width * width, 2 * width
    scalar = name in ("gated_deltanet", "deltanet", "mamba2", "lightning")
    keys = values = head_size
    shift = width
    if name == "rwkv7":
        matrices, rest = 4 * square + 2 * width * sum(ranks), 12 * width + norm
    elif name == "rwkv6":
        matrices = 5 * square + 2 * 5 * width * MIX_RANK + 2 * width * DECAY_RANK
        rest = 8 * width + norm
    elif name == "rwkv5":
        matrices, rest = 5 * square, 6 * width + norm
    elif name == "rwkv4":
        matrices, rest = 4 * square, 5 * width
        heads, keys, values = 1, width, 3
    elif name in ("gated_deltanet", "deltanet"):
        gated = name == "gated_deltanet"
        matrices = 5 * square + (1 + gated) * width * heads
        rest = CONV * 3 * width + head_size + gated * 2 * heads
        shift = (CONV - 1) * 3 * width
    elif name == "kda":
        matrices = 4 * square + 4 * width * head_size + width * heads
        rest = CONV * 3 * width + width + heads + head_size
        shift = (CONV - 1) * 3 * width
    elif name == "mamba2":
        inner, keys = 2 * width, 2 * head_size
        heads, mixed = inner // head_size, inner + 2 * keys
        matrices = width * (inner + mixed + heads) + inner * width
        rest = (CONV + 1) * mixed + 3 * heads + inner
        shift = (CONV - 1) * mixed
    else:
        assert name == "lightning", name
        matrices, rest, shift = 5 * square, width + heads, 0
    delta = name in ("rwkv7", "gated_deltanet", "deltanet", "kda")
    return MixerSizes(
        heads, keys, values, shift, matrices, matrices + rest, scalar=scalar, delta=delta
    )
