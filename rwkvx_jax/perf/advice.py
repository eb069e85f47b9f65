"""What to change: when a program does not fit, and when it fits but wastes the machine.

Every line names the field of the config, its value now and the next one to try.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from rwkvx_jax.config import Config
from rwkvx_jax.perf.planner import Plan, gib

# Shares below which nothing is worth saying.
_TIGHT = 0.05  # of the memory
_WORTH = 0.1  # arguments, of the memory used
_NETWORK = 0.3  # of the estimated step
_LOGITS = 0.05  # of the memory
# Tokens of a device's part of a loss block below which the head's gradient, which is added up
# (and summed over devices) once a block, costs more than the block's own work saves in memory.
_FEW_TOKENS = 1024


def advise(plan: Plan, config: Config, sizes: Mapping[str, int]) -> list[str]:
    """Lines of advice, most useful first.

    Args:
      plan: a compiled (or refused) program.
      config: the experiment.
      sizes: devices along each mesh axis.
    """
    trains = plan.program.kind == "train"
    if not plan.fits:
        return list(_smaller(plan, config, sizes) if trains else _smaller_reading(plan, sizes))
    return list(_faster(plan, config, sizes)) if trains else []


def _smaller(plan: Plan, config: Config, sizes: Mapping[str, int]) -> Iterator[str]:
    """For a train step that does not fit, in the order in which it costs least."""
    stage, run = plan.program.stage, config.run
    ways = sizes["data"] * sizes["fsdp"]
    spread = ways * sizes["context"]  # of the tokens of a loss block
    if run.remat == "none":
        yield 'run.remat is "none": "block" keeps one activation a block instead of all'
    rows = stage.global_batch / stage.accumulation / ways
    if rows >= 2:
        yield (
            f"stages.accumulation is {stage.accumulation}, which leaves {rows:g} samples a device "
            f"at once: {_next_divisor(stage.accumulation, stage.global_batch)} halves activations"
        )
    logits = run.loss_block / spread * config.model.vocab_size * 4 / sizes["tensor"]
    if logits > _LOGITS * plan_memory(plan):
        yield (
            f"run.loss_block is {run.loss_block}: its float32 logits take {gib(logits):.2f} GiB on "
            f"each device, several times over; try {run.loss_block // 2}"
        )
    if plan.memory is not None and plan.memory.arguments > plan.memory.temporaries:
        yield _more_fsdp(plan, sizes)
    yield (
        f"mesh.context is {sizes['context']}: {2 * sizes['context']} halves the activations that "
        "each device keeps of a sequence (it must cut it into whole chunks); on as many chips, "
        "with half of mesh.fsdp and half of the samples at once"
    )
    if (
        plan.memory is None
        or _WORTH * plan.memory.used < plan.memory.arguments <= plan.memory.temporaries
    ):
        yield _more_fsdp(plan, sizes)
    yield f"or a topology of more chips than {plan.devices}, or with more memory a chip"


def _more_fsdp(plan: Plan, sizes: Mapping[str, int]) -> str:
    moved = f", taken from data {sizes['data']}" if sizes["data"] > 1 else ""
    share = ""
    if plan.memory is not None:
        share = f" (now {gib(plan.memory.arguments):.2f} GiB on each device)"
    return (
        f"mesh.fsdp is {sizes['fsdp']}: {2 * sizes['fsdp']}{moved} halves parameters and "
        f"moments{share}"
    )


def _smaller_reading(plan: Plan, sizes: Mapping[str, int]) -> Iterator[str]:
    if plan.program.kind == "prefill":
        yield "a shorter --piece: activations grow with it, the cache does not"
    yield f"fewer texts (--batch), or a shorter --length: the cache is {plan.program.name}"
    yield (
        f"mesh.tensor is {sizes['tensor']}: {2 * sizes['tensor']} halves each device's share of "
        "the cache and of the matrices"
    )


def _faster(plan: Plan, config: Config, sizes: Mapping[str, int]) -> Iterator[str]:
    stage, run, found = plan.program.stage, config.run, plan.estimate
    ways = sizes["data"] * sizes["fsdp"]
    part = stage.global_batch // stage.accumulation
    if part % ways:
        fitting = math.gcd(part, ways)
        yield (
            f"{part} samples at once (global_batch {stage.global_batch} / accumulation "
            f"{stage.accumulation}) are not divisible by data x fsdp = {ways}: devices repeat each "
            f"other's work. Use data x fsdp = {fitting} and give the rest to context or tensor"
        )
    if plan.memory.headroom < _TIGHT * plan.memory.available:
        yield (
            f"only {gib(plan.memory.headroom):.2f} GiB of headroom: a held-out batch of other "
            "shape, or another compiler version, may not fit"
        )
    spread = ways * sizes["context"]
    tokens = run.loss_block / spread
    if tokens < min(_FEW_TOKENS, stage.seq_len * part / spread):
        yield (
            f"run.loss_block is {run.loss_block}, {tokens:.0f} tokens a device: the gradient of "
            f"the head is added up once for each; try {1 << math.ceil(math.log2(4096 * spread))}"
        )
    if found.network > _NETWORK * found.seconds:
        name, kind = next(iter(found.collectives.items()))
        yield (
            f"{found.network / found.seconds:.0%} of the estimated step are collectives, most of "
            f"it {name}: {kind['bytes'] / 1e9:.1f} GB a device. "
            + (
                f"mesh.tensor is {sizes['tensor']}: less of it, and more of context or fsdp, "
                "moves less"
                if sizes["tensor"] > 1
                else "More tokens a device (a larger batch, fewer devices) hide more of it"
            )
        )


def plan_memory(plan: Plan) -> float:
    """Bytes that programs may use on a device."""
    return plan.memory.available if plan.memory else plan.refusal[1]


def _next_divisor(now: int, of: int) -> int:
    return next((n for n in range(2 * now, of + 1) if of % n == 0), of)
