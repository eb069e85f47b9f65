"""The named recurrences against arrays made by other people's code, every implementation.

Outputs, final states and gradients of flash-linear-attention and transformers, with their float64
corrections, to 1e-5 of the largest entry; 2e-5 where log decays reach -20. The TPU kernel is
interpreted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rwkvx_jax.ops import dispatch, recurrences
from tests.helpers import assert_close, shared_path

FORMS = {
    "sequential": {"implementation": "sequential"},
    "chunked": {"implementation": "chunked"},
    "chunked-64": {"implementation": "chunked", "chunk_size": 64},
    "chunked-8": {"implementation": "chunked", "chunk_size": 8},
    "associative": {"implementation": "associative", "chunk_size": 16},
}
# File: function, its arguments in order, layout of the arrays (heads first or not), tolerance.
CASES = {
    "gated_delta_rule_a": ("gated_delta_rule", "q k v g beta h0", False, 2e-5),
    "gated_delta_rule_b": ("gated_delta_rule", "q k v g beta h0", False, 2e-5),
    "delta_rule": ("delta_rule", "q k v beta h0", True, 1e-5),
    "gated_delta_product_n2": ("gated_delta_product", "q k v g beta h0", False, 1e-5),
    "kda_softplus": ("kda", "q k v g beta h0", False, 2e-5),
    "kda_lowerbound_grouped": ("kda", "q k v g beta h0", False, 1e-5),
    "gla": ("gla", "q k v gk h0", False, 2e-5),
    "simple_gla_mamba2": ("simple_gla", "q k v g h0", False, 1e-5),
    "simple_gla_lightning": ("simple_gla", "q k v g h0", False, 1e-5),
    "simple_gla_retnet": ("simple_gla", "q k v g h0", False, 1e-5),
    "rwkv6_a": ("rwkv6", "q k v w u h0", True, 2e-5),
    "rwkv6_b": ("rwkv6", "q k v w u h0", True, 2e-5),
}


def load(name):
    stored = np.load(shared_path("reference", "neighbours", f"op_{name}.npz"))

    def exact(key):
        value = stored[key].astype(np.float64)
        if key + "_corr" in stored:
            value += stored[key + "_corr"].astype(np.float64) * stored[key + "_corr_scale"]
        return value

    return stored, exact


# What the TPU kernel takes of them: K and V in steps of 32.
KERNEL_CASES = ("gated_delta_rule_a", "kda_softplus", "gla", "rwkv6_a")


@pytest.mark.parametrize(
    "form", [f if f == "chunked" else pytest.param(f, marks=pytest.mark.thorough) for f in FORMS]
)
@pytest.mark.parametrize("case", CASES)
def test_neighbours(case, form):
    compare(case, **FORMS[form])


@pytest.mark.parametrize(
    "case",
    [c if c == "gla" else pytest.param(c, marks=pytest.mark.thorough) for c in KERNEL_CASES],
)
def test_neighbours_by_the_interpreted_kernel(case, monkeypatch):
    monkeypatch.setattr(dispatch, "current_platform", lambda: "tpu")
    with pltpu.force_tpu_interpret_mode():
        compare(case, implementation="pallas")


def compare(case, **options):
    """Output, final state and all gradients of a recurrence by its name with those of the file."""
    function, names, heads_first, tolerance = CASES[case]
    stored, exact = load(case)

    def ours(key, x):
        """An array of the file in our layout: time before heads, states [B, H, V, K]."""
        if key.endswith(("h0", "ht")):
            return x.swapaxes(-1, -2)
        return x.swapaxes(1, 2) if heads_first and x.ndim > 2 else x

    options["scale"] = float(stored["scale"])
    if case == "kda_lowerbound_grouped":
        options["decay_bound"] = float(stored["lower_bound"])
    run = functools.partial(getattr(recurrences, function), **options)
    inputs = [jnp.asarray(ours(name, stored[name])) for name in names.split()]
    (o, ht), pull_back = jax.vjp(run, *inputs)
    assert_close(o, ours("o", exact("o")), rel=tolerance, name="o")
    assert_close(ht, ours("ht", exact("ht")), rel=tolerance, name="ht")
    cotangents = tuple(jnp.asarray(ours(key, stored[f"ct_{key}"])) for key in ("o", "ht"))
    for name, gradient in zip(names.split(), pull_back(cotangents), strict=True):
        expected = ours(name, exact(f"d{name}"))
        assert_close(gradient, expected, rel=tolerance, name=f"gradient of {name}")
