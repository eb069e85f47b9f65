"""The kernels and sizes whose static costs are kept: what to compile, and its units of work.

A builder gives, for a case, a function of one kernel, the arguments to compile it for, the bytes
that the kernel's contract cannot avoid moving, and its units of work.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels import block_sparse_tpu, delta_rule_tpu, routing, selection_tpu, wkv7_tpu
from pallas_kernels.recurrence_tpu import TILES
from rwkvx_jax.perf.stages import CORES
from rwkvx_jax.perf.topology import smallest


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel at one size on one chip.

    Attributes:
      kernel: name of the pallas_call, as in the dump's file names.
      chip: key of `CORES`.
      width, time: D (of the values) and T; the batch is 1.
      chunk, top_k: of sparse attention; 0 for other kernels.
      group: of sparse attention, query heads that share a key head and a choice of chunks.
      documents: whether documents are packed.
    """

    kernel: str
    chip: str
    width: int
    time: int
    chunk: int = 0
    top_k: int = 0
    group: int = 1
    documents: bool = False

    @property
    def name(self) -> str:
        sparse = f"/C{self.chunk}/K{self.top_k}" if self.chunk else ""
        group = f"/M{self.group}" if self.group > 1 else ""
        documents = "/documents" if self.documents else ""
        return f"{self.kernel}/{self.chip}/D{self.width}/T{self.time}{sparse}{group}{documents}"

    def with_documents(self) -> "Case":
        """The same with packed documents."""
        return dataclasses.replace(self, documents=True)

    @property
    def topology(self) -> str:
        return smallest(self.chip)


def all_cases() -> list[Case]:
    """Every case in the checked-in table."""
    recurrence = [
        Case(kernel, chip, width, time)
        for kernel in WKV7
        for chip in CORES
        for width in (768, 2560)
        for time in (4096, 65536)
    ]
    delta_rules = [Case(kernel, chip, 2048, 4096) for kernel in DELTA_RULES for chip in CORES]
    attention = [
        Case(kernel, chip, 768, 131072, chunk, top_k)
        for kernel in BLOCK_SPARSE
        for chip in CORES
        for chunk, top_k in ((2048, 3), (128, 16))
    ]
    smallest = [Case(kernel, "v5e", 768, 131072, 32, 64) for kernel in BLOCK_SPARSE]
    # What a device of configs/rwkvx_3b6_stage2.py:v5p128 has: heads of a text, windows of LongCE.
    pods = [
        Case(kernel, "v5p", width, time, 2048, 3)
        for kernel in BLOCK_SPARSE
        for width, time in ((320, 65536), (2560, 8000))
        if time == 65536 or "backward" not in kernel
    ]
    return recurrence + delta_rules + attention + smallest + pods


def case_named(name: str) -> Case:
    """The case of a name such as "wkv7_forward/v5e/D768/T4096"."""
    kernel, chip, *numbers = name.removesuffix("/documents").split("/")
    documents = name.endswith("/documents")
    return Case(kernel, chip, *(int(x[1:]) for x in numbers), documents=documents)


def _wkv7(case: Case, struct):
    """Function, arguments, bytes of the contract (every input and output once, chunk states once),
    and units of work: (token, head pair)."""
    head, tile = 64, wkv7_tpu.TILES[case.chip]
    packs, chunks = case.width // 128, case.time // tile.chunk
    tokens = struct((1, case.time, case.width), jnp.bfloat16)
    log_w = struct((1, case.time, case.width), jnp.float32)
    state = struct((1, packs, head, 128), jnp.float32)
    borders = []
    if case.documents:
        found = functools.partial(wkv7_tpu._borders, chunk=tile.chunk)
        fresh = jax.eval_shape(found, jax.ShapeDtypeStruct((1, case.time), bool))
        borders = [struct(x.shape, x.dtype) for x in fresh]
    states = struct((1, chunks, packs, head, 128), jnp.float32)
    inputs = (tokens, log_w, tokens, tokens, tokens, tokens)
    contract = [*inputs, state, state, states, tokens]
    if case.kernel == "wkv7_forward":

        def function(*x):
            return wkv7_tpu._forward_call(
                x[:6], x[6], x[7:], head=head, tile=tile, residuals=True, interpret=False
            )

        arguments = (*inputs, state, *borders)
    else:
        inverse = struct((1, chunks, packs, tile.chunk, 2 * tile.chunk), jnp.bfloat16)

        def function(*x):
            return wkv7_tpu._backward_call(
                x[:6], x[6:10], x[10], x[11], x[12:], head=head, tile=tile, interpret=False
            )

        arguments = (*inputs, states, state, inverse, tokens, tokens, state, *borders)
        contract += [*inputs, state]  # and the gradients
    minimum = sum(math.prod(x.shape) * x.dtype.itemsize for x in contract)
    return function, arguments, minimum, case.time * packs


def _delta_rule(case: Case, struct):
    """As for WKV-7. The contract: every argument and result once, and the chunks' states."""
    key, value, delta, decay_bound = DELTA_RULES[case.kernel]
    heads, tokens = case.width // value, (1, case.time, case.width // value)
    keys, values = struct((*tokens, key), jnp.bfloat16), struct((*tokens, value), jnp.bfloat16)
    log_w = struct((*tokens, 1 if decay_bound is None else key), jnp.float32)
    inputs = delta_rule_tpu._Tokens(keys, log_w, keys, values, *[keys, keys] * delta)
    call = delta_rule_tpu._make_call(
        inputs,
        before=False,
        decay_bound=decay_bound,
        tile=delta_rule_tpu._tile_of(TILES[case.chip], inputs, decay_bound),
        interpret=False,
    )
    plan = delta_rule_tpu._plan_of(call, keys)
    _, layout = delta_rule_tpu._token_layouts(call, plan, reverse=False)
    packed = [
        struct(x.shape, x.dtype)
        for x in (shape(jnp.float32 if i == 1 else jnp.bfloat16) for i, shape in enumerate(layout))
    ]
    state = struct(plan.shapes()["state"].shape, jnp.float32)
    forward = functools.partial(delta_rule_tpu._forward_call, call, plan, residuals=True)
    y, end, *saved = jax.eval_shape(forward, packed, state)
    given = [x for x in inputs if x is not None]
    states = struct((heads, case.time // call.shape.chunk, value, key), jnp.float32)
    contract = [*given, state, state, states, values]
    if case.kernel.endswith("forward"):
        function, arguments = forward, (packed, state)
    else:
        function = functools.partial(delta_rule_tpu._backward_call, call, plan)
        saved = [struct(x.shape, x.dtype) for x in saved]
        arguments = (packed, saved, packed[3], state)
        contract += [*given]  # and the gradients
    minimum = sum(math.prod(x.shape) * x.dtype.itemsize for x in contract)
    return function, arguments, minimum, case.time * case.width // 128


def block_sparse_plan(case: Case, struct):
    """The kernels' plan for heads of 64, bfloat16."""
    tokens = lambda heads: struct((1, case.time, heads, 64), jnp.bfloat16)
    q, k = tokens(case.width // 64), tokens(case.width // 64 // case.group)
    tile = block_sparse_tpu.TILES[case.chip]
    sizes = case.top_k - 1, case.chunk, 0.125, 0
    return block_sparse_tpu._plan_of(q, k, *sizes, tile, case.documents)


def block_sparse_calls(case: Case, struct) -> dict:
    """Function and arguments of each kernel of sparse attention."""
    heads, chunk = case.width // 64 // case.group, case.chunk
    plan = block_sparse_plan(case, struct)
    shape, routes = plan.shape, plan.routing
    x = struct((1, case.time, heads, 64), jnp.float32 if case.group > 1 else jnp.bfloat16)
    packed = struct((1, plan.rows, plan.packs * 128), jnp.bfloat16)
    keys_packed = struct((1, plan.keys, plan.packs * 128), jnp.bfloat16)
    wide = struct(keys_packed.shape, jnp.float32)
    results, first = struct(plan.results, jnp.float32), struct((1,), jnp.int32)
    groups = plan.all_packs * shape.heads
    per_tile = struct((groups, routes.all_tiles), jnp.int32)
    routed = struct((groups, routes.all_tiles, routes.rows), jnp.int32), per_tile, per_tile
    keys = struct((groups, routes.segments, routes.slots * routes.segment), jnp.int32)
    ordered = struct((groups, routes.segments, routes.pairs // 128 + 8, 128), jnp.int32)
    means = struct((1, case.time // chunk, heads, 64), jnp.float32)
    call = lambda function: functools.partial(function, plan, interpret=False)
    documents = None
    if case.documents:
        found = functools.partial(block_sparse_tpu._Documents.of, plan)
        starts = jax.ShapeDtypeStruct((1, case.time), jnp.int32)
        documents = jax.tree.map(lambda x: struct(x.shape, x.dtype), jax.eval_shape(found, starts))
    lowest = struct((1, case.time), jnp.int32) if case.documents else None

    def choose(x, means, lowest):
        options = {"chunk_size": chunk, "count": case.top_k - 1}
        return selection_tpu.select_by_keys(x, means, 0, lowest=lowest, **options)

    return {
        "select_chunks": (choose, (x, means, lowest)),
        "routing_sort": (lambda x: routing._sort_call(x, routes, False), (keys,)),
        "routing_emit": (
            lambda *x: routing._emit_call(*x, routes, False),
            (ordered, per_tile, per_tile),
        ),
        "block_sparse_start": (call(block_sparse_tpu._start), (packed,)),
        "block_sparse_past_forward": (
            call(block_sparse_tpu._past_forward),
            (routed, packed, keys_packed, keys_packed, results, documents),
        ),
        "block_sparse_own_forward": (
            call(block_sparse_tpu._own_forward),
            (packed, keys_packed, keys_packed, results, first, documents),
        ),
        "block_sparse_past_backward": (
            call(block_sparse_tpu._past_backward),
            (routed, packed, keys_packed, keys_packed, packed, results, documents),
        ),
        "block_sparse_own_backward": (
            call(block_sparse_tpu._own_backward),
            (packed, keys_packed, keys_packed, packed, results, wide, wide, first, documents),
        ),
    }


def _block_sparse(case: Case, struct):
    """As for WKV-7. The contract: every argument once and every result once; what the past part
    updates in place is both. Units: (token, head pair), of those that one call takes."""
    function, arguments = block_sparse_calls(case, struct)[case.kernel]
    results = jax.eval_shape(function, *arguments)
    arrays = jax.tree.leaves((arguments, results))
    minimum = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    packs = case.width // 128
    if "past" in case.kernel:
        plan = block_sparse_plan(case, struct)
        packs = plan.packs_together * case.group
        if case.kernel == "block_sparse_past_backward":  # it adds to zeros, and so reads them
            sums = 2 * plan.batch * plan.keys * plan.packs * 128 * 4
            minimum += sums * (2 * plan.sums - 1)
    return function, arguments, minimum, case.time * packs


WKV7 = ("wkv7_forward", "wkv7_backward")
DELTA_RULES = {  # (K, V, with a and b, bound of a decay a channel), as architectures use them
    f"{name}_{direction}": sizes
    for name, sizes in {
        "scalar_delta_rule": (128, 128, True, None),  # Gated DeltaNet
        "vector_delta_rule": (128, 128, True, -5.0),  # KDA
        "scalar_linear_attention": (128, 64, False, None),  # Mamba-2
    }.items()
    for direction in ("forward", "backward")
}
BLOCK_SPARSE = (
    "select_chunks",
    "routing_sort",
    "routing_emit",
    "block_sparse_start",
    "block_sparse_past_forward",
    "block_sparse_own_forward",
    "block_sparse_past_backward",
    "block_sparse_own_backward",
)
PACKED = (  # those that take documents
    *WKV7,
    "select_chunks",
    "block_sparse_past_forward",
    "block_sparse_own_forward",
    "block_sparse_past_backward",
    "block_sparse_own_backward",
)
BUILDERS = {
    **dict.fromkeys(WKV7, _wkv7),
    **dict.fromkeys(DELTA_RULES, _delta_rule),
    **dict.fromkeys(BLOCK_SPARSE, _block_sparse),
}
