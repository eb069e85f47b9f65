"""Precision of matrix products by the dtype of their operands."""

import jax
import jax.numpy as jnp


def precision_of(dtype: jax.typing.DTypeLike) -> jax.lax.Precision | None:
    """Precision for products of arrays of a dtype, so that it means the same on every chip.

    TPUs and GPUs by default round float32 operands to fewer bits (on a TPU to bfloat16), so float32
    asks for all of them. Narrower dtypes lose nothing by the default, None.
    """
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
