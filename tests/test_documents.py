"""Every command, program, path and link of the README, CONTRIBUTING and docs/ exists.

Commands are read by the parsers that would read them, and not run; programs are run (those that
would compile a model: on shapes alone).
"""

import argparse
import functools
import itertools
import re
import runpy
import shlex
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from rwkvx_jax import ModelConfig, RunConfig, cli, config, create_model
from rwkvx_jax.__main__ import COMMANDS
from rwkvx_jax.completion import Options as CompletionOptions
from rwkvx_jax.convert.__main__ import Options as ConvertOptions
from rwkvx_jax.convert.pth import write_pth
from rwkvx_jax.data.__main__ import Arguments as DataOptions
from rwkvx_jax.doctor.__main__ import Options as DoctorOptions
from rwkvx_jax.eval import TASKS
from rwkvx_jax.eval import parse as parse_eval
from rwkvx_jax.evals import report
from rwkvx_jax.evals.short.convert import Options as TaskOptions
from rwkvx_jax.expand_checkpoint import Options as ExpandOptions
from rwkvx_jax.generate.__main__ import Options as GenerateOptions
from rwkvx_jax.model import abstract_model, with_params
from rwkvx_jax.perf.overlap import overlap_parser
from rwkvx_jax.perf.plan_command import make_parser as plan_parser
from rwkvx_jax.train import make_parser as train_parser
from tests.convert.convert_checkpoints import official_tensors
from tests.evals.eval_models import QUIET, FakeReader, make_model
from tests.helpers import ROOT
from tests.model_cases import FLOAT32, TINY, random_params

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}

FOLDERS = "configs docs results benchmarks tools tests pallas_kernels rwkvx_jax".split()
SOURCES = [path.name for path in ROOT.glob("*.py")]
SOURCES += [str(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.S | re.M)
INLINE = re.compile(r"`([^`]+)`")
COMMAND = re.compile(
    r"(?:^|[ \"'/])(?:python3? (?P<door>train\.py|eval\.py|-m [\w.]+|[\w/]+\.py)"
    r"|rwkvx (?P<command>[a-z]+))(?P<rest>.*)$"
)
DATACLASSES = {
    "-m rwkvx_jax.completion": CompletionOptions,
    "-m rwkvx_jax.convert": ConvertOptions,
    "-m rwkvx_jax.data": DataOptions,
    "-m rwkvx_jax.doctor": DoctorOptions,
    "-m rwkvx_jax.evals": TaskOptions,
    "-m rwkvx_jax.expand_checkpoint": ExpandOptions,
    "-m rwkvx_jax.generate": GenerateOptions,
}
OVERRIDABLE = {
    "train.py": train_parser,
    "-m rwkvx_jax.plan": plan_parser,
    "-m rwkvx_jax.perf.overlap": overlap_parser,
}
CONFIG = "configs/tiny_cpu.py"
PLACEHOLDERS = {"N": "1", "TASK": "passkey", "FILE": CONFIG, "CONFIG": CONFIG}
PLACEHOLDERS["FILE:VARIANT"] = "configs/rwkvx_3b6_stage2.py:v5p128"


def prose(text: str) -> str:
    """A page without its code blocks; lines of a paragraph joined."""
    kept = [line for line in FENCED.sub("", text).splitlines() if not line.startswith("    ")]
    return re.sub(r"(?<=\S)\n *(?=\S)", " ", "\n".join(kept))


def spans(text: str) -> list[str]:
    return INLINE.findall(prose(text))


def block_lines(text: str) -> list[str]:
    """Lines of all code blocks but Python's, continued ones joined."""
    code = [body for _, language, body in FENCED.findall(text) if language != "python"]
    code += [line for line in FENCED.sub("", text).splitlines() if line.startswith("    ")]
    return re.sub(r"\\\n\s*", "", "\n".join(code)).splitlines()


def door_of(command: str) -> str:
    """What `python DOOR` would be of `rwkvx COMMAND`."""
    module = COMMANDS[command].module.removesuffix(".__main__")
    scripts = {"rwkvx_jax.train": "train.py", "rwkvx_jax.eval": "eval.py"}
    return scripts.get(module, f"-m {module}")


def commands(text: str) -> list[tuple[str, str, bool]]:
    """(door, flags, whether it is whole) of every command of a page."""
    found = [(line, True) for line in block_lines(text)]
    for span in spans(text):
        if span.startswith(("train.py ", "eval.py ")):
            found.append((f"python {span}", False))
        elif span.startswith(("python ", "rwkvx ")):
            mentioned = ("eval.py" in span or "rwkvx eval" in span) and "--output" not in span
            found.append((span, len(span.split()) > 2 + ("-m" in span) and not mentioned))
    matches = [(COMMAND.search(line), whole) for line, whole in found]
    ends = re.compile(r" +(>>?|2>&1|\||&&) .*")
    rests = [
        (m["door"] or door_of(m["command"]), ends.sub("", m["rest"]), whole)
        for m, whole in matches
        if m
    ]
    # Of a command inside quotes (of ssh, say) the closing one belongs to what is around it.
    return [
        (door, re.sub('"$', "", rest) if rest.count('"') % 2 else rest, whole)
        for door, rest, whole in rests
    ]


def arguments(flags: str) -> list[str]:
    """Words of a command, placeholders filled in and optional parts taken."""
    flags = re.sub(r"--data-dir \S+", "", flags)  # is looked into while it is parsed
    choices = re.sub(r"(?<=[\[\w])\|[\w|]+", "", flags)
    words = shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", choices), comments=True)
    return [PLACEHOLDERS.get(word, word) for word in words if word != "..."]


class Parsed(Exception):
    """A script has read its flags."""


def parse_script(door: str, argv: list[str], monkeypatch) -> None:
    """Runs a script until it has parsed its flags."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self, *given, **options):
        real(self, *given, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [door, *argv])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script there
    with pytest.raises(Parsed):
        if door.startswith("-m "):
            runpy.run_module(door[3:], run_name="__main__")
        else:
            runpy.run_path(str(ROOT / door), run_name="__main__")


def parse(door: str, argv: list[str], monkeypatch) -> None:
    """Gives a command's flags to the parser that would read them.

    Raises:
      ConfigError, SystemExit: they would be refused.
    """
    if door in OVERRIDABLE:
        cli.parse_with_overrides(OVERRIDABLE[door](door), argv)
    elif door in DATACLASSES:
        cli.parse(DATACLASSES[door], argv, door)
    elif door == "eval.py":
        parse_eval(argv)
    elif door == "-m pytest":  # it would run them; that the files exist is checked below
        assert argv, "names no tests"
    else:
        parse_script(door, argv, monkeypatch)


@functools.cache
def known_flags() -> set[str]:
    """Flags of all doors that are no fields of Config."""
    kinds = [kind for kind, _ in TASKS.values()] + list(DATACLASSES.values())
    flags = {f"--{name.replace('_', '-')}" for kind in kinds for name in kind.__dataclass_fields__}
    parsers = [make(door) for door, make in OVERRIDABLE.items()]
    flags |= {name for p in parsers for action in p._actions for name in action.option_strings}
    return flags | {"--help", "--help-all", "--version"}


def check_overrides(words: list[str], config_file: str = CONFIG) -> None:
    """Raises ConfigError for dotted flags that the fields of Config do not take."""
    words = [re.sub(r"\.N\.", ".0.", word) for word in words]
    dotted = lambda word: word.startswith("--") and "." in word
    words = [
        word for before, word in itertools.pairwise(["", *words]) if dotted(word) or dotted(before)
    ]
    whole = all(len(words) > i + 1 or "no-" in word for i, word in enumerate(words) if "--" in word)
    if words and whole:
        cli.parse_with_overrides(train_parser("train.py"), ["--config", config_file, *words])


@pytest.fixture(autouse=True)
def as_a_user(monkeypatch):
    """At the root of the checkout, and as in anyone's own script: the suite's stricter rules don't
    hold there."""
    monkeypatch.chdir(ROOT)
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.mark.parametrize("page", TEXTS)
def test_commands_are_those_of_the_parsers(page, monkeypatch, capsys):
    for door, flags, whole in commands(TEXTS[page]):
        argv = arguments(flags)
        try:
            if whole and "..." not in flags and "--help" not in argv:
                parse(door, argv, monkeypatch)
            else:
                unknown = {word for word in argv if word.startswith("--")} - known_flags() - {"--"}
                assert not unknown, unknown
        except (SystemExit, config.ConfigError) as error:
            printed = capsys.readouterr()
            pytest.fail(f"{page}: {door}{flags}: {error} {printed.out}{printed.err}")


@pytest.mark.parametrize("page", TEXTS)
def test_flags_in_the_text_exist(page, capsys):
    elsewhere = {"--accelerator-type", "--runtime-version", "--data-dir", "--no-deps", "--spot"}
    elsewhere |= {"--node-id", "--node-count", "--node-prefix", "--build-arg", "--constraint"}
    elsewhere |= {"--model_args", "--batch_size"}  # of lm_eval
    for span in spans(TEXTS[page]):
        if not span.startswith("--"):
            continue
        words = arguments(span.replace("=", " "))
        flags = {word.rstrip(",") for word in words if word.startswith("--")}
        unknown = {flag for flag in flags if "." not in flag} - known_flags() - elsewhere
        assert not unknown, f"{page}: `{span}`: no command has {unknown}"
        try:
            check_overrides(words)
        except (SystemExit, config.ConfigError) as error:
            pytest.fail(f"{page}: `{span}`: {error} {capsys.readouterr().err}")
    for name, flags in re.findall(r"^\| `([\w:]+)` (--[^|]+)", TEXTS[page], re.M):
        check_overrides(arguments(flags), name)


@pytest.mark.parametrize("page", TEXTS)
def test_targets_packages_and_paths_exist(page):
    text = TEXTS[page]
    code = [*spans(text), *block_lines(text)]
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for piece in code:
        for target in re.findall(r"^\s*make ([\w-]+)", piece):
            assert target in targets, f"{page}: make {target}"
        for wanted in re.findall(r"pip install .*?\.\[([\w,]+)\]", piece):
            assert set(wanted.split(",")) <= set(extras["optional-dependencies"]), piece
        assert "pip install 'rwkvx-jax" not in piece, f"{page}: the package is not published"
        for module in re.findall(r"python3? -m (rwkvx_jax[\w.]*|benchmarks[\w.]*|tools\S*)", piece):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), piece
        for name in re.findall(r"(?<![\w/.])[\w.]+(?:/[\w.]+)*\.py\b", piece):
            assert any(f"/{path}".endswith(f"/{name}") for path in SOURCES), f"{page}: no {name}"
        for name in re.findall(rf"(?<![\w/.])((?:{'|'.join(FOLDERS)})/[\w./-]*\w)", piece):
            assert (ROOT / name).exists(), f"{page}: no {name}"


def anchors(text: str) -> set[str]:
    """Names that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", TEXTS[page])):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: no {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page}: no #{anchor} in {path}"


# ------------------------------------------------------------------------------------------------
# Programs
# ------------------------------------------------------------------------------------------------


def programs(page: str) -> list[str]:
    return [body for _, language, body in FENCED.findall(TEXTS[page]) if language == "python"]


def run(page: str, number: int = 0, **names) -> dict:
    """Runs a block of a page with some names given, and returns all names."""
    names = {"__name__": "__main__", **names}
    exec(compile(programs(page)[number], f"{page}, block {number}", "exec"), names)
    return names


def on_shapes(page: str, make_names=dict, number: int = 0) -> None:
    """Traces a block of a page: nothing is compiled or computed."""
    jax.eval_shape(lambda: run(page, number, **make_names()) and 0)


def test_every_program_is_run_by_a_test():
    counts = {page: len(programs(page)) for page in TEXTS if programs(page)}
    assert counts == {
        "README.md": 1,
        "docs/attention.md": 2,
        "docs/convert.md": 1,
        "docs/data.md": 3,
        "docs/evaluation.md": 1,
        "docs/generation.md": 3,
        "docs/recurrences.md": 2,
        "docs/research.md": 3,
    }


def test_transformers():
    names = run("docs/recurrences.md", 1)
    assert names["small"].num_blocks == 0
    count = names["qwen25_3b"]().num_parameters
    assert f"print(qwen25_3b().num_parameters)       # {count}" in TEXTS["docs/recurrences.md"]


def test_the_recurrence_in_another_model():
    names = run("docs/research.md", 0)
    assert names["newest"] < 1e-5 and names["older"] < 1e-5


def test_another_selector():
    errors = run("docs/research.md", 1)["errors"]
    assert errors["max"] < errors["mean"] < errors["recent"]


def test_a_custom_stage():
    names = run("docs/research.md", 2)
    assert names["history"][-1] < names["history"][0] - 0.05


def test_a_task_of_ones_own(tmp_path):
    (source,) = programs("docs/evaluation.md")
    assert source.count("\n") < 120
    names = run("docs/evaluation.md")
    flags = {"checkpoint": (Path("m"),), "output": tmp_path, "depths": 3, "trials": 2}
    options = cli.parse(names["WordOptions"], ["--checkpoint", "m", "--output", "x"], "word")
    assert options.lengths == (256, 1024) and options.letters == 8
    solve = lambda text: " " + re.search(r"The word is (\w+)\.", text)[1]
    for output, reader, share in (("right", solve, 1.0), ("wrong", lambda text: " no", 0.0)):
        options = names["WordOptions"](**(flags | {"output": tmp_path / output}))
        results = names["evaluate"](options, [make_model()], QUIET, FakeReader(reader))
        assert results.summary("model")["all"]["accuracy"] == share
    (part,) = report.sections(report.find_runs([tmp_path / "right"]))
    assert part.title == "word" and part.table.rows[0][1:3] == ["100.0 (61 to 100)"] * 2


def test_programs_that_show_calls():
    tokens = jnp.zeros((2, 16), jnp.int32)
    on_shapes("README.md")
    channels, heads = jnp.zeros((1, 16, 2, 32)), jnp.zeros((1, 16, 2))
    names = dict.fromkeys(("r", "log_w", "k", "v", "a", "b", "q"), channels)
    on_shapes("docs/recurrences.md", lambda: names | {"g": heads, "beta": heads})
    arrays = lambda: dict.fromkeys("qkv", jnp.zeros((1, 1024, 2, 16)))
    on_shapes("docs/attention.md", arrays)
    on_shapes("docs/attention.md", lambda: arrays() | {"gates": jnp.zeros((1, 1024, 2, 3))}, 1)
    on_shapes(
        "docs/generation.md",
        lambda: {
            "model": create_model(ModelConfig.tiny(), RunConfig(compute_dtype="float32")),
            "tokens": tokens,
            "lengths": jnp.array([16, 3]),
            "token": tokens[:, 0],
        },
    )


@pytest.mark.thorough
def test_answering_requests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = with_params(abstract_model(TINY, FLOAT32), random_params(TINY))
    names = run("docs/generation.md", 1, model=model, prompts=[[1, 2], [3]], system_prompt=[4])
    answer = names["answer"]
    assert answer.number in (0, 1) and len(answer.tokens) <= 100 and not answer.problem
    names = run("docs/generation.md", 2, book=[1, 2, 3], **names)
    assert names["later"].prefix.tolist() == [1, 2, 3]


def test_programs_of_conversion_and_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pth(Path("RWKV-X.pth"), official_tensors())
    run("docs/convert.md")
    assert Path("again.pth").exists()
    for block in (0, 1):
        run("docs/data.md", block, **vars(config))
    stage = SimpleNamespace(seq_len=32, global_batch=2, name="s", source_weights=())
    Path("text.txt").write_text("What is read here is short. " * 100)
    given = SimpleNamespace(data=config.DataConfig(path="text.txt"), model=ModelConfig.tiny())
    names = run("docs/data.md", 2, config=given, workdir=tmp_path, stage=stage, step=1)
    assert next(iter(names["iterator"]))["tokens"].shape == (2, 33)
