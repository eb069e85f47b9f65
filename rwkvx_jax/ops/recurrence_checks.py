"""What the recurrences ask of their arguments, checked before anything runs."""

import jax
import jax.numpy as jnp

from rwkvx_jax.ops.recurrence_chunked import MAX_CHUNK_SIZE

DTYPES = ("float32", "bfloat16", "float16")


def check_arrays(
    op: str, arrays: dict[str, jax.Array], state: jax.Array | None, *, general: bool
) -> None:
    """Raises ValueError, naming the array, unless shapes, heads and dtypes agree.

    Args:
      op: name of the op, for messages.
      arrays: r, log_w, k, v and what else it takes, [B, T, heads, channels] each.
      state: the start state [B, HV, V, K], or None.
      general: whether log_w may have one channel, and v (with it log_w, a, b) several heads for
        each of r.
    """
    r, v = arrays["r"], arrays["v"]
    for name, x in (("r", r), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{op}: {name} must be a non-empty [B, T, heads, channels], got the "
                             f"shape {x.shape}")  # fmt: skip
    if r.dtype not in DTYPES:
        raise ValueError(f"{op}: r must be one of {', '.join(DTYPES)}, got {r.dtype}")
    (batch, time, heads, keys), (value_heads, width) = r.shape, v.shape[2:]
    if value_heads % heads or (not general and value_heads != heads):
        wanted = "must be a multiple" if general else "must be as many"
        raise ValueError(f"{op}: v has {value_heads} heads and r has {heads}: those of v {wanted}")
    any_heads = (heads, value_heads)
    allowed = {
        "r": ((heads,), (keys,)),
        "k": ((heads,), (keys,)),
        "v": ((value_heads,), (width,)),
        "log_w": (any_heads, (keys, 1) if general else (keys,)),
        "a": (any_heads, (keys,)),
        "b": (any_heads, (keys,)),
    }
    for name, x in arrays.items():
        of_heads, of_channels = allowed[name]
        fits = x.ndim == 4 and x.shape[:2] == (batch, time)
        if not fits or x.shape[2] not in of_heads or x.shape[3] not in of_channels:
            either = lambda sizes: " or ".join(map(str, dict.fromkeys(sizes)))
            raise ValueError(
                f"{op}: {name} must be [{batch}, {time}, {either(of_heads)}, {either(of_channels)}]"
                f" for r {r.shape} and v {v.shape}, got {x.shape}"
            )
        if x.dtype != r.dtype and not (name == "log_w" and x.dtype == jnp.float32):
            alternative = " or float32" if name == "log_w" else ""
            raise ValueError(
                f"{op}: {name} must have the dtype of r, {r.dtype}{alternative}, got {x.dtype}"
            )
    if state is None:
        return
    shape = (batch, value_heads, width, keys)
    if state.shape != shape:
        raise ValueError(f"{op}: state must be [B, HV, V, K] = {shape}, got {state.shape}")
    if state.dtype != jnp.float32:
        raise ValueError(f"{op}: state must be float32, got {state.dtype}; cast it")


def lowest_decay(op: str, log_w: jax.Array) -> float | None:
    """The smallest entry of log_w, or None where it is traced.

    Raises:
      ValueError: an entry is positive, or not a number.
    """
    if isinstance(log_w, jax.core.Tracer) or not getattr(log_w, "is_fully_addressable", True):
        return None
    with jax.ensure_compile_time_eval():  # a constant of a program that is being traced
        # Compared one by one: the largest of NaNs is -inf on a CPU (jax 0.10.2).
        wrong = ~(log_w <= 0)
        if jnp.any(wrong):
            found = float(log_w[wrong].ravel()[0])
            raise ValueError(
                f"{op}: log_w is the logarithm of a decay, at most 0, got {found:g}: pass log(w), "
                "with w from 0 to 1"
            )
        return float(jnp.min(log_w))


def check_chunk_size(op: str, chunk_size: int | None, implementation: str) -> None:
    """Raises ValueError unless the implementation takes such chunks."""
    if chunk_size is None:
        return
    if implementation not in ("chunked", "associative"):
        raise ValueError(
            f"{op}: chunk_size is for 'chunked' and 'associative'; {implementation!r} has none, "
            "leave it None"
        )
    if not 1 <= chunk_size <= MAX_CHUNK_SIZE or chunk_size & (chunk_size - 1):
        raise ValueError(
            f"{op}: chunk_size must be a power of two from 1 to {MAX_CHUNK_SIZE}, got {chunk_size}"
        )
