"""What the kernels share: sizes of a vector register, products, and which inputs they take."""

import math

import jax
import jax.numpy as jnp
from jax import lax

LANES, SUBLANES = 128, 8  # of a TPU's vector register of 32-bit words
LOG2_E = math.log2(math.e)
F32 = jnp.float32
# Contracted dimensions of x @ y, x @ y^T, x^T @ y.
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def dot(x: jax.Array, y: jax.Array, contracted=NN) -> jax.Array:
    """Product of matrices inside a kernel, float32.

    One pass of the matrix unit for bfloat16 operands, full float32 otherwise.
    """
    precision = lax.Precision.HIGHEST if x.dtype == F32 else lax.Precision.DEFAULT
    return lax.dot_general(
        x, y, (contracted, ((), ())), precision=precision, preferred_element_type=F32
    )


def unsupported_reason(head_size: int, value_size: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why no kernel here can take such inputs; None if their sizes and dtype will do."""
    if head_size != value_size:
        return f"key size {head_size} and value size {value_size} differ"
    if head_size not in (64, 128):
        return f"head size {head_size} is not 64 or 128"
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(F32)):
        return f"dtype {jnp.dtype(dtype)} is not bfloat16 or float32"
    return None


def triton():
    """Pallas' Triton backend, imported where a GPU kernel is built and nowhere else: JAX has
    announced to remove it, and everything but the GPU kernels works without."""
    from jax.experimental.pallas import triton as module

    return module


def missing_triton() -> str | None:
    """Why no GPU kernel can be built with this JAX; None if one can."""
    try:
        triton()
    except ImportError:
        return (
            f"jax {jax.__version__} has no jax.experimental.pallas.triton, which the GPU kernels "
            "are written with: install a jax that has it (0.10 does)"
        )
    return None
