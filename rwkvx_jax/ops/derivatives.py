"""Clear errors where a hand-written gradient does not support a kind of differentiation.

A function with a gradient of its own has no forward mode, and a loop of data-dependent length no
reverse mode; JAX's messages name neither the op nor the way out. Here arrays pass through an
identity whose tangents reach one mode only: the other raises the given message.
"""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(message: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays; forward-mode differentiation of what is made of them raises ValueError(message).

    To be put on the arguments of a function with its own gradient. Integer arrays pass.
    """
    return _mark(_reverse_only, message, arrays)


def forward_only(message: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays; reverse-mode differentiation of how they were made raises ValueError(message).

    To be put on the results of loops of data-dependent length. Integer arrays pass.
    """
    return _mark(_forward_only, message, arrays)


def _mark(primitive, message, arrays):
    inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return tuple(_identity(primitive, message, x) if inexact(x) else x for x in arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _identity(primitive, message, x):
    return x


@_identity.defjvp
def _(primitive, message, primals, tangents):
    return primals[0], primitive.bind(tangents[0], message=message)


def _tangent_identity(name, *, evaluate, transpose):
    """A linear identity on tangents; its evaluation or its transposition may raise."""
    primitive = Primitive(name)
    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(lambda x, message: x)
    ad.deflinear2(primitive, transpose)
    batching.primitive_batchers[primitive] = lambda xs, dims, message: (
        primitive.bind(xs[0], message=message),
        dims[0],
    )
    mlir.register_lowering(primitive, lambda context, x, message: [evaluate(x, message=message)])
    return primitive


def _refuse(*_, message):
    raise ValueError(message)


_reverse_only = _tangent_identity(
    "reverse_only", evaluate=_refuse, transpose=lambda ct, x, message: [ct]
)
_forward_only = _tangent_identity("forward_only", evaluate=lambda x, message: x, transpose=_refuse)
