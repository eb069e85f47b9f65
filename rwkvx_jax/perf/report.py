"""Plans as text for people, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rwkvx_jax.config import Config
from rwkvx_jax.perf.planner import Plan, gib

_PLACES = 8  # rows of the table of places


def header(config: Config, name: str, topology: str, sizes: Mapping[str, int]) -> str:
    """What is planned, on what."""
    devices = 1
    for size in sizes.values():
        devices *= size
    mesh = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    model = config.model
    blocks = (
        "Transformer, "
        if not model.num_blocks
        else ""
        if model.mixer == "rwkv7"
        else f"{model.mixer_title} blocks, "
    )
    return (
        f"{name} on {topology}: {devices} devices, mesh {mesh}\n"
        f"model {blocks}L {model.num_blocks}, M {model.num_attention_blocks}, D {model.width}, "
        f"chunk {model.chunk_size}, top-k {model.top_k}, {config.run.compute_dtype}\n"
        "All times are estimates from the compiled program and the vendor's peaks; nothing ran."
    )


def text(plan: Plan, advice: Sequence[str]) -> str:
    """The report of one program."""
    return "\n".join(_lines(plan, advice))


def _lines(plan: Plan, advice: Sequence[str]) -> Iterator[str]:
    yield f"{_title(plan)} -- compiled in {plan.compile_seconds:.0f} s"
    for choice in plan.choices:
        yield _row("implementation", choice)
    if plan.memory is None:
        needed, available = plan.refusal
        yield _row(
            "memory",
            f"DOES NOT FIT: the compiler needs {f'{gib(needed):.2f}' if needed else 'more than'} "
            f"of {gib(available):.2f} GiB a device",
        )
    else:
        yield from _memory(plan)
        yield from _work(plan)
        yield from _time(plan)
    for note in plan.notes:
        yield _row("NOTE", note)
    for number, line in enumerate(advice):
        yield _row("to change" if number == 0 else "", line)


def _title(plan: Plan) -> str:
    program, stage = plan.program, plan.program.stage
    if stage is None:
        return f"{program.kind} {program.name}"
    parts = f", in {stage.accumulation} parts" if stage.accumulation > 1 else ""
    return (
        f"stage {stage.name}: {stage.global_batch} samples of {stage.seq_len:,} tokens a step"
        f"{parts}, {stage.loss}, trains {stage.trained_part}, {stage.steps:,} steps = "
        f"{stage.tokens / 1e9:.3g} B tokens"
    )


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield _row(
        "memory a device",
        f"arguments {gib(memory.arguments):.2f} + results {gib(memory.results):.2f} + temporaries "
        f"{gib(memory.temporaries):.2f} + program {gib(memory.program):.2f} = "
        f"{gib(memory.used):.2f} of {gib(memory.available):.2f} GiB",
    )
    verdict = "headroom" if plan.fits else "DOES NOT FIT, short of"
    share = abs(memory.headroom) / memory.available
    yield _row("", f"{verdict} {gib(abs(memory.headroom)):.2f} GiB ({share:.0%})")


def _work(plan: Plan) -> Iterator[str]:
    found = plan.estimate
    yield _row(
        "work a device",
        f"{found.flops / 1e12:.4g} Tflop, HBM {found.bytes / 1e12:.3g} TB, ICI "
        f"{found.ici_bytes / 1e9:.3g} GB, DCN {found.dcn_bytes / 1e9:.3g} GB"
        + (f", host copies {found.host_bytes / 1e9:.3g} GB" if found.host_bytes else ""),
    )
    for name, kind in found.collectives.items():
        if kind["seconds"] > 0.01 * found.network:
            yield _row(
                "",
                f"{name}: {kind['times']:,.0f} times, {kind['bytes'] / 1e9:.3g} GB, "
                f"{_seconds(kind['seconds'])}",
            )
    for name, kernel in found.kernels.items():
        basis = "scheduled bundles" if kernel["bundles_known"] else "its cost estimate"
        yield _row("", f"kernel {name}: {kernel['times']:,.0f} times, time from {basis}")


def _time(plan: Plan) -> Iterator[str]:
    found = plan.estimate
    unit = "step" if plan.program.kind == "train" else "run"
    yield _row(
        "time (estimates)",
        f"{unit} {_seconds(found.seconds)} with no collective hidden ({_seconds(found.serial)} + "
        f"{_seconds(found.network)} of collectives"
        + (f" + {_seconds(found.host)} of host copies)" if found.host_bytes else ")"),
    )
    yield _row(
        "",
        f"floor {_seconds(found.floor)}, {found.bound} bound (compute {_seconds(found.compute)}, "
        f"memory {_seconds(found.memory)}, network {_seconds(found.network)})",
    )
    for name, seconds in (("estimate", found.seconds), ("at the floor", found.floor)):
        days = plan.days(seconds)
        rest = "" if days is None else f", all tokens in {_days(days)}"
        yield _row(
            name,
            f"{plan.tokens_per_second(seconds):,.0f} tokens/s, model-flops utilisation "
            f"{plan.utilisation(seconds):.1%}{rest}",
        )
    total = sum(found.places.values())
    rows = list(found.places.items())[:_PLACES]
    yield _row("where it goes", ", ".join(f"{name} {s / total:.0%}" for name, s in rows))


def _row(name: str, value: str) -> str:
    return f"  {name:17} {value}"


def _seconds(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _days(days: float) -> str:
    return f"{days:.2f} days" if days >= 0.1 else f"{days * 24:.2f} hours"


def record(plan: Plan, advice: Sequence[str]) -> dict:
    """The same as plain data; sizes in bytes, times in seconds, a device where nothing is said."""
    program = plan.program
    out = {
        "program": program.kind,
        "name": program.name,
        "tokens": program.tokens,
        "model_flops": program.flops,
        "devices": plan.devices,
        "compile_seconds": round(plan.compile_seconds, 1),
        "implementations": list(plan.choices),
        "fits": plan.fits,
        "notes": list(plan.notes),
        "advice": list(advice),
    }
    if plan.memory is None:
        return out | {"needed": plan.refusal[0], "available": plan.refusal[1]}
    found, memory = plan.estimate, plan.memory
    return out | {
        "memory": {
            name: getattr(memory, name)
            for name in ("arguments", "results", "temporaries", "program", "available", "headroom")
        },
        "flops": found.flops,
        "matrix_passes": found.passes,
        "hbm_bytes": found.bytes,
        "ici_bytes": found.ici_bytes,
        "dcn_bytes": found.dcn_bytes,
        "host_bytes": found.host_bytes,
        "collectives": found.collectives,
        "kernels": found.kernels,
        "places_seconds": found.places,
        "estimate": _times(plan, found.seconds),
        "floor": _times(plan, found.floor) | {"bound": found.bound},
    }


def _times(plan: Plan, seconds: float) -> dict:
    return {
        "seconds": seconds,
        "tokens_per_second": plan.tokens_per_second(seconds),
        "utilisation": plan.utilisation(seconds),
        "days": plan.days(seconds),
    }
