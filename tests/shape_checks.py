"""Annotated shapes and dtypes, checked while tests run."""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from flax import nnx


def checked_after_the_call(function):
    """The type checker that jaxtyping applies to both checks of a call, before and after it.

    Only the one after it, which looks at arguments and results, is made: of arguments that do not
    fit, a function's own error comes first, which tests ask for. NumPy arrays pass as what they are
    to JAX. Nothing is asked of `__init__`, as JAX makes dataclasses of shapes and of nothing, too.
    """
    before = inspect.signature(function).return_annotation is Any
    if before or function.__name__ == "__init__":
        return function
    check = beartype(function)

    @functools.wraps(function)
    def checked(*args, **kwargs):
        args = [_as_jax(x) for x in args]
        return check(*args, **{name: _as_jax(x) for name, x in kwargs.items()})

    return checked


def _as_jax(x):
    if hasattr(x, "__array__") and not isinstance(x, jax.Array | nnx.Variable | np.generic):
        with jax.ensure_compile_time_eval():
            return jnp.asarray(np.asarray(x))
    if type(x) is dict:
        return {name: _as_jax(value) for name, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(map(_as_jax, x))
    return x
