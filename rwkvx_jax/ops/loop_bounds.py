"""A bound on loops whose length depends on data, left where the planner finds it.

Such a loop has no length in the compiled program, and with it nothing that the program costs.
"""

import math

import jax


def at_most(times: float):
    """Context: loops traced in it run at most so often, on average over all times they are entered.

    The bound goes into the loops' names (`jax.named_scope`), which compilers keep; it changes
    nothing that is computed. `perf.loops` reads it.
    """
    return jax.named_scope(f"at_most_{math.ceil(times)}_times")
