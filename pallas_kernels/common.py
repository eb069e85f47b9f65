"""What the kernels share: products, lanes, which chip a program is for, and which inputs they take.

Words for sizes, in the same sense in every kernel; a file names its own beside them:

* lanes and sublanes: 128 x 8 words of 32 bits make a vector register of a TPU.
* pack: the heads that share 128 lanes, two of size 64 or one of 128.
* chunk: in attention what a query chooses; in the recurrence the tokens that are solved at once.
* pair: a query and a past chunk that it chose, in one of its `slots` choices.
* segment: queries whose pairs are sorted together and whose rows lie in VMEM together.
* tile: rows of pairs of one chunk that meet its keys in one matrix product.
* block: what a grid step reads or writes of an array; a block of keys is one chunk, or several
  small ones that are `joined`, so that one step takes `together` tiles of them.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import name_of

LANES, SUBLANES = 128, 8  # of a TPU's vector register of 32-bit words
LOG2_E = math.log2(math.e)
F32 = jnp.float32
# Contracted dimensions of x @ y, x @ y^T, x^T @ y.
NN, NT, TN = ((1,), (0,)), ((1,), (1,)), ((0,), (0,))


def iota(shape: tuple[int, ...], dimension: int) -> jax.Array:
    """The index along a dimension, int32."""
    return lax.broadcasted_iota(jnp.int32, shape, dimension)


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


# --------------------------------------------------------------------------------------------
# Chips
# --------------------------------------------------------------------------------------------


SCALAR_WORDS = 9 << 14
"""Words of scalar memory for the tables and scalar blocks of a kernel.

It has 2^18, but the compiler keeps its own scalars there too, and moves them to main memory and
back where tables leave no room: at 183,000 words it did, at 145,000 not.
"""


def current_chip() -> str | None:
    """A name in `chips.TPUS` or `chips.GPUS` by the mesh in force, else the default backend; None:
    another device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return name_of(kind)


def grid_options(grid: tuple[int, ...], parallel: int, vmem_limit_bytes: int | None = None) -> dict:
    """Arguments of a `pallas_call` whose grid has independent steps along its first axes.

    The cores of a chip that is one device (v5p has two) halve the steps of these axes, all of them
    taken as one row: an odd number leaves one core idle in the end, and one step a core altogether.
    That number stands beside the kernel in the compiled program, where `rwkvx_jax.perf` reads it.

    Args:
      grid: of the call.
      parallel: how many axes, from the first, may run in any order; the others run in order.
      vmem_limit_bytes: VMEM the compiler may use; None: its default.
    """
    order = ("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=order, vmem_limit_bytes=vmem_limit_bytes
        ),
        "metadata": {"parallel_steps": str(math.prod(grid[:parallel]))},
    }
