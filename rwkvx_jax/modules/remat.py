"""What the backward pass keeps of a block, and what it computes again: policies by name.

A backward pass needs the values inside a block. Keeping all of them takes more memory than most
chips have; computing all of them again costs one more forward pass. The policies between the two
keep what is expensive to compute per byte: results of large matrix products and what other devices
sent, which modules mark with `keep`, and results of Pallas kernels. The rest, which is elementwise,
is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

_KEPT, _INPUT = "kept", "block_input"


def keep(x: jax.Array) -> jax.Array:
    """Marks a value that is expensive to compute again for its bytes; it is unchanged."""
    return checkpoint_name(x, _KEPT)


def block_input(x: jax.Array) -> jax.Array:
    """Marks what a block starts from; the value is unchanged."""
    return checkpoint_name(x, _INPUT)


def rematerialize(block: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """`block`, the body of a scan over layers, with a backward pass by the policy `remat`.

    Args:
      block: a function of arrays and modules.
      remat: a value of `RunConfig.remat`.
    """
    if remat == "none":
        return block
    # In the body of a scan nothing can be merged with the forward pass, which is another loop.
    return jax.checkpoint(block, prevent_cse=False, policy=_POLICIES[remat])


def _is_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy: keeps what a Pallas kernel returns, the residuals for its own gradient included."""
    return primitive.name == "pallas_call"


_policies = jax.checkpoint_policies
_POLICIES = {
    "block": _policies.nothing_saveable,
    "save_projections": _policies.save_from_both_policies(
        _policies.save_only_these_names(_KEPT), _is_kernel
    ),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
