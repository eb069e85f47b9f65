"""Clear errors where a hand-written gradient does not support a kind of differentiation.

A function with a gradient of its own has no forward mode, and a loop of data-dependent length no
reverse mode; JAX's messages name neither the op nor the way out. Here tangents pass through an
identity that supports one mode only: in the other it raises the given message.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(message: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays; forward-mode differentiation of what is made of them raises ValueError(message).

    For the arguments of a function with its own gradient. Integer arrays pass.
    """
    inexact = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)
    return tuple(_argument(message, x) if inexact(x) else x for x in arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _argument(message, x):
    return x


@_argument.defjvp
def _(message, primals, tangents):
    return primals[0], _reverse_only.bind(tangents[0], message=message)


def forward_only(message: str, run: Callable, plain: Callable) -> Callable:
    """`run`, differentiable as `plain` in forward mode; reverse mode raises ValueError(message).

    Args:
      message: names the way out.
      run: function of arrays that returns a tuple of floating arrays.
      plain: the same function, in terms that JAX differentiates in forward mode.
    """
    result = jax.custom_jvp(run)

    @result.defjvp
    def _(primals, tangents):
        # The results apart from their tangents: reverse mode wants them known first.
        tangents = jax.jvp(plain, primals, tangents)[1]
        return run(*primals), tuple(_forward_only.bind(x, message=message) for x in tangents)

    return result


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
