"""Plans of the shipped configs: which fit on which TPUs, as the table of docs/plan.md.

    python benchmarks/plans.py --output results/plans

Each case is compiled in a process of its own (one to six minutes of one core, a few GB) and leaves
its JSON in the output directory; cases that are there already are not compiled again. Then all of
them are printed as one table, in Markdown. Compiled on a CPU for TPUs that are not here: nothing is
run, and every time is an estimate.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30

# Name -> experiment of configs/, topology, overrides.
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "3b6-v5p": ("rwkvx_3b6_stage2", "v5p:4x4x8", ()),
    "3b6-v5p128": ("rwkvx_3b6_stage2:v5p128", "v5p:4x4x8", ()),
    "3b6-v5e256": ("rwkvx_3b6_stage2:v5e256", "v5e:16x16", ()),
    "3b6-v6e64": ("rwkvx_3b6_stage2:v6e64", "v6e:8x8", ()),
    "128k-v5p": (
        "rwkvx_3b6_stage2:v5p128",
        "v5p:4x4x8",
        ("--stages.0.seq-len", "131072", "--run.remat", "block"),
    ),
    "128k-v5e": ("rwkvx_3b6_stage2:v5e256", "v5e:16x16", ("--stages.0.seq-len", "131072")),
    "1m-v5p": (
        "rwkvx_3b6_stage2:v5p128",
        "v5p:4x4x8",
        ("--stages.0.seq-len", "1048576", "--run.remat", "block"),
    ),
    "1m-v5p-16": (
        "rwkvx_3b6_stage2:v5p128",
        "v5p:4x4x8",
        (
            "--stages.0.seq-len",
            "1048576",
            "--stages.0.global-batch",
            "8",
            "--mesh.fsdp",
            "8",
            "--mesh.context",
            "16",
            "--run.remat",
            "block",
        ),
    ),
    "3b6s1-v5e256": ("rwkvx_3b6_stage1:v5e256", "v5e:16x16", ()),
    "3b6s1-v6e64": ("rwkvx_3b6_stage1:v6e64", "v6e:8x8", ()),
    "0b2-v5e16": ("rwkvx_0b2_stage2", "v5e:4x4", ()),
    "0b2-v5e256": ("rwkvx_0b2_stage2:v5e256", "v5e:16x16", ()),
    "0b2-v6e64": ("rwkvx_0b2_stage2:v6e64", "v6e:8x8", ()),
}


def compile_case(name: str, output: Path) -> None:
    """Leaves NAME.json, and NAME.txt as the command prints it, in the output directory."""
    config, topology, overrides = CASES[name]
    command = [sys.executable, "-m", "rwkvx_jax.plan", "--config", config]
    command += ["--topology", topology, *overrides, "--json", str(output / f"{name}.json")]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if not (output / f"{name}.json").exists():
        raise SystemExit(f"{name}: {' '.join(command[1:])} ended with status {run.returncode}")
    (output / f"{name}.txt").write_text(run.stdout)


def row(name: str, plan: dict) -> str:
    """One line of the table."""
    config, topology, overrides = CASES[name]
    (program,) = plan["programs"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1)
    cells = [f"`{config}`{' ' + ' '.join(overrides) if overrides else ''}", topology, mesh]
    if "memory" not in program:
        needed = f"{program['needed'] / GIB:.1f} of " if program["needed"] else "more than "
        cells += [f"{needed}{program['available'] / GIB:.2f}: **does not fit**", "", "", "", ""]
    else:
        memory, step, floor = program["memory"], program["estimate"], program["floor"]
        used = memory["available"] - memory["headroom"]
        verdict = "" if program["fits"] else ": **does not fit**"
        cells += [
            f"{memory['arguments'] / GIB:.1f} + {memory['temporaries'] / GIB:.1f}, "
            f"{used / GIB:.1f} of {memory['available'] / GIB:.2f}{verdict}",
            f"{floor['seconds']:.2f} to {step['seconds']:.2f}",
            f"{step['utilisation']:.0%} to {floor['utilisation']:.0%}",
            f"{floor['days']:.2f} to {step['days']:.2f}",
            f"{program['compile_seconds']:.0f}",
        ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="directory of the JSON files")
    parser.add_argument("--only", help="cases whose name contains this")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    names = [name for name in CASES if options.only is None or options.only in name]
    print("| config | TPU | mesh | memory a chip, GiB: arguments + temporaries, all | step, s | "
          "model-flops utilisation | days to the stage's tokens | compiled in, s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        if not (options.output / f"{name}.json").exists():
            compile_case(name, options.output)
        plan = json.loads((options.output / f"{name}.json").read_text())
        print(row(name, plan), flush=True)


if __name__ == "__main__":
    main()
