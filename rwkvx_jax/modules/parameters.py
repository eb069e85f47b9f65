"""Creation of parameters and the initial values of both families.

Constants follow two families (spec: RWKV-X repository = "rwkvx"; RWKV-LM since May 2025 =
"rwkv_lm"). All of them depend on the layer index, which is traced: layers are made by one vmap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import EllipsisType

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from rwkvx_jax.config import ModelConfig
from rwkvx_jax.ops.precision import precision_of


def parameter(value: jax.Array, *axes: str) -> nnx.Param:
    """A float32 parameter with one logical axis name per dimension (stacking adds "layers")."""
    assert value.ndim == len(axes), (value.shape, axes)
    return nnx.Param(value.astype(jnp.float32), axes=axes)


@partial(jax.tree_util.register_dataclass, data_fields=("matrix", "a", "b"), meta_fields=())
@dataclass(frozen=True)
class Adapted:
    """A matrix with a low-rank adapter: stands for matrix + a b, which is never formed.

    As the value of a parameter it takes the matrix's place; stacks have leading layers.
    """

    matrix: Float[Array, "*layers D E"]
    a: Float[Array, "*layers D R"]
    b: Float[Array, "*layers R E"]

    def __getitem__(self, index: EllipsisType) -> Adapted:
        """Itself: how the value of a parameter is read (`weight[...]`)."""
        return self


def project(
    x: Float[Array, "*any D"], weight: Float[Array, "D E"] | Adapted
) -> Float[Array, "*any E"]:
    """x times weight in x's dtype, which decides the precision."""
    if isinstance(weight, Adapted):
        return project(x, weight.matrix) + project(project(x, weight.a), weight.b)
    return jnp.matmul(x, weight.astype(x.dtype), precision=precision_of(x.dtype))


def norm(config: ModelConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.LayerNorm | nnx.RMSNorm:
    """The backbone's norm over D channels, with statistics in float32 and output in `dtype`."""
    metadata = {"axes": ("vector",)}
    if config.backbone == "llama":
        return nnx.RMSNorm(
            config.width,
            epsilon=config.norm_eps,
            dtype=dtype,
            scale_metadata=metadata,
            rngs=rngs,
        )
    return nnx.LayerNorm(
        config.width,
        epsilon=config.norm_eps,
        dtype=dtype,
        use_fast_variance=False,
        scale_metadata=metadata,
        bias_metadata=metadata,
        rngs=rngs,
    )


def uniform(key: jax.Array, shape: tuple[int, ...], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def orthogonal(key: jax.Array, shape: tuple[int, int], gain: float) -> jax.Array:
    """A matrix with orthonormal rows or columns, times gain.

    Layers are made one after the other: on a CPU a batched QR waits for threads of the pool it
    runs in, and two of them at once on two cores wait for each other for ever (jaxlib 0.10).
    """
    make = jax.custom_batching.sequential_vmap(
        lambda key: jax.nn.initializers.orthogonal(gain)(key, shape)
    )
    return make(key)


def input_matrix(
    config: ModelConfig, key: jax.Array, shape: tuple[int, int], *, gain: float, bound: float
) -> jax.Array:
    """By the family an orthogonal matrix times gain, or a uniform one within bound / sqrt(D); with
    the backbone "llama" a normal one with deviation 1 / sqrt(in)."""
    if config.backbone == "llama":
        return jax.random.normal(key, shape) * shape[0] ** -0.5
    if config.init == "rwkv_lm":
        return orthogonal(key, shape, gain)
    return uniform(key, shape, bound * config.width**-0.5)


def matrix(
    config: ModelConfig,
    rngs: nnx.Rngs,
    gain: float = 1.0,
    bound: float = 0.5,
    *,
    shape: tuple[int, int] | None = None,
    axes: tuple[str, str] = ("embed", "heads"),
) -> nnx.Param:
    """The parameter of an `input_matrix`, by default [D, D]."""
    shape = shape or (config.width, config.width)
    return parameter(input_matrix(config, rngs.params(), shape, gain=gain, bound=bound), *axes)


def first_embedding(config: ModelConfig, key: jax.Array) -> jax.Array:
    """Embeddings [W, D]: tiny ones, which the norm after them scales; without it (the backbone
    "llama") normal ones with deviation 1 / sqrt(D)."""
    shape = config.vocab_size, config.width
    if config.backbone == "llama":
        return jax.random.normal(key, shape) * config.width**-0.5
    return uniform(key, shape, 1e-4)


def first_head(config: ModelConfig, key: jax.Array) -> jax.Array:
    """A head [D, W] of its own."""
    width, vocab = config.width, config.vocab_size
    if config.backbone == "llama":
        return jax.random.normal(key, (width, vocab)) * width**-0.5
    return orthogonal(key, (width, vocab), 0.5 * max(1.0, vocab / width) ** 0.5)


def output_matrix(config: ModelConfig, rngs: nnx.Rngs, shape: tuple[int, int]) -> jax.Array:
    """A block's last matrix: zeros, so that a new block changes nothing. A Transformer, which is
    never made by expansion, has input matrices here too."""
    if config.num_blocks:
        return jnp.zeros(shape)
    return input_matrix(config, rngs.params(), shape, gain=1.0, bound=0.5)


def low_rank_out(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Second matrix [R, D] of a low-rank pair: orthogonal, gain 0.1 (larger for tall shapes)."""
    rows, columns = shape
    return orthogonal(key, shape, 0.1 * max(1.0, rows / columns) ** 0.5)


@dataclass(frozen=True)
class LayerConstants:
    """Initial vectors of RWKV-7 layer `layer` (traced float) out of `layers`.

    Each property is a [D] vector. `ramp` is i / D, `linear` is i / (D - 1) - 0.5, `zigzag` is
    z |z| with z running over [-1, 1] inside each head. With a single layer the layer fraction
    r01 is 0.
    """

    config: ModelConfig
    layer: jax.Array
    layers: int

    @property
    def rwkv_lm(self) -> bool:
        return self.config.init == "rwkv_lm"

    @property
    def r01(self) -> jax.Array:
        return self.layer / max(1, self.layers - 1)

    @property
    def r10(self) -> jax.Array:
        return 1.0 - self.layer / self.layers

    @property
    def ramp(self) -> jax.Array:
        return jnp.arange(self.config.width) / self.config.width

    @property
    def linear(self) -> jax.Array:
        return self.position - 0.5

    @property
    def position(self) -> jax.Array:
        return jnp.arange(self.config.width) / max(1, self.config.width - 1)

    @property
    def zigzag(self) -> jax.Array:
        half = max(1.0, (self.config.head_size - 1) / 2)
        z = (jnp.arange(self.config.width) % self.config.head_size - half) / half
        return z * jnp.abs(z)

    def token_shift(self, name: str) -> jax.Array:
        """x_r, x_w, x_k, x_v, x_a or x_g: how much of the previous token each channel mixes in."""
        power = {"r": 0.2, "g": 0.2, "w": 0.9, "a": 0.9, "k": 0.7, "v": 0.7}[name]
        if name in "kv" and not self.rwkv_lm:
            power, shift = (0.9, 0.4) if name == "k" else (0.4, 0.6)
            return 1.0 - (self.ramp ** (power * self.r10) + shift * self.r01)
        return 1.0 - self.ramp ** (power * self.r10)

    def channel_shift(self) -> jax.Array:
        """x_k of the channel mix."""
        return 1.0 - self.ramp ** (self.r10**4)

    def decay(self) -> jax.Array:
        """w0."""
        if self.rwkv_lm:
            curve = self.position ** (1.0 + self.r01**0.3)
            return -6.0 + 6.0 * curve + 0.5 + 2.5 * self.zigzag
        return -7.0 + 5.0 * self.position ** (0.85 + self.r01**0.5) + 0.5

    def learning_rate(self) -> jax.Array:
        """a0."""
        if self.rwkv_lm:
            return -0.19 + 0.3 * self.zigzag + 0.4 * self.linear
        return jnp.zeros(self.config.width)

    def value_residual(self) -> jax.Array:
        """v0."""
        return 0.73 - 0.4 * self.linear if self.rwkv_lm else jnp.ones(self.config.width)

    def removal_key(self) -> jax.Array:
        """k_k."""
        return 0.71 - 0.1 * self.linear if self.rwkv_lm else jnp.full(self.config.width, 0.85)

    def key_scale(self) -> jax.Array:
        """k_a."""
        return jnp.full(self.config.width, 1.02 if self.rwkv_lm else 1.0)

    def bonus(self) -> jax.Array:
        """r_k."""
        return jnp.full(self.config.width, -0.04 if self.rwkv_lm else 0.0)

    def group_norm_scale(self) -> jax.Array:
        scale = ((1.0 + self.layer) / self.layers) ** 0.7 if self.rwkv_lm else jnp.float32(1.0)
        return jnp.broadcast_to(scale, (self.config.width,))
