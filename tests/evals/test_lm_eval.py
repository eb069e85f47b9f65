"""lm_eval's own command with our models, tasks of a user's own, and results in lm_eval's layout."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from rwkvx_jax.config import ConfigError  # noqa: E402
from rwkvx_jax.data.chat import chat_text  # noqa: E402
from rwkvx_jax.evals.report import read_results  # noqa: E402
from rwkvx_jax.evals.short.files import check_samples, folder_of  # noqa: E402
from rwkvx_jax.evals.short.loading import fingerprint, load_tasks  # noqa: E402
from rwkvx_jax.evals.short.registered import Arguments, RwkvxModel  # noqa: E402
from rwkvx_jax.evals.short.task import ShortOptions  # noqa: E402
from tests.evals.eval_models import run_command, write_checkpoint  # noqa: E402
from tests.helpers import ROOT  # noqa: E402

NUMBER = re.compile(r"-?\d+\.\d+")
COLORS = """
task: colors
dataset_path: json
dataset_kwargs:
  data_files: {test: data/colors.jsonl}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1.0}
"""
SHAPES = COLORS.replace("task: colors", "task: shapes").replace("Question:", "Q:")
GROUP = """
group: both
task: [colors, shapes]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Task files with their data in a folder beside them; the process runs in another folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks = tmp_path / "tasks"
    (tasks / "data").mkdir(parents=True)
    for name, text in (("colors", COLORS), ("shapes", SHAPES), ("both", GROUP)):
        (tasks / f"{name}.yaml").write_text(text)
    record = {"choices": ["red", "blue", "dark green"]}
    rows = [record | {"question": f"Which colour is {i}?", "label": i % 3} for i in range(4)]
    (tasks / "data/colors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tasks


def make_options(folder, **flags):
    """With a --data-dir lm_eval's own tasks, thousands of files, are left alone."""
    flags = {"tasks": ("colors",), "include_path": folder, "data_dir": folder} | flags
    return ShortOptions(checkpoint=(Path("m"),), output=folder, **flags)


def values_of(path):
    """Results or samples, less what differs from run to run."""
    (file,) = path
    value = json.loads(file.read_text())
    for name in ("date", "total_evaluation_time_seconds", "git_hash", "upper_git_hash"):
        assert name in value
        value[name] = None
    return value


@pytest.mark.thorough
def test_results_are_those_of_lm_evals_command(folder, tmp_path, monkeypatch):
    """As a user calls both, offline; lm_eval runs where the data is, ours anywhere."""
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--model", "rwkvx", "--model_args", f"pretrained={checkpoint},piece=64"]
    flags += ["--tasks", "both", "--include_path", folder, "--log_samples", "--limit", "3"]
    flags += ["--batch_size", "auto", "--seed", "0", "--output_path", tmp_path / "theirs"]
    subprocess.run(
        [sys.executable, "-m", "rwkvx_jax.evals.lm_eval", *map(str, flags)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
        timeout=600,
    )
    own = ["--checkpoint", checkpoint, "--output", tmp_path / "ours", "--include-path", folder]
    own += ["--tasks", "both", "--piece", "64", "--limit", "3", "--log-samples"]
    own += ["--data-dir", folder]
    run_command(monkeypatch, "short", *own)
    theirs, ours = (folder_of(tmp_path / name, str(checkpoint)) for name in ("theirs", "ours"))
    expected, found = (values_of(place.glob("results_*.json")) for place in (theirs, ours))
    assert found["config"].pop("bootstrap_iters") < expected["config"].pop("bootstrap_iters")
    run = {"model_args", "batch_size", "device", "gen_kwargs"}
    assert found["config"].keys() == expected["config"].keys()
    for name in run:
        del found["config"][name], expected["config"][name]
    for value in (found, expected):  # theirs counts from where it runs
        for config in value["configs"].values():
            config["dataset_kwargs"] = None
            config["metadata"] = {k: config["metadata"][k] for k in ("version", "config_source")}
    assert expected.pop("fewshot_as_multiturn") is None and found.pop("fewshot_as_multiturn")
    assert found == expected and set(found["results"]) == {"both", "colors", "shapes"}
    for task in ("colors", "shapes"):
        samples = []
        for place in (theirs, ours):
            (file,) = place.glob(f"samples_{task}_*.jsonl")
            samples.append([json.loads(line) for line in file.read_text().splitlines()])
        for expected, found in zip(*samples, strict=True):
            for name in ("resps", "filtered_resps"):  # another number of devices, other roundings
                (a, b) = (json.dumps(sample.pop(name)) for sample in (expected, found))
                assert NUMBER.sub("", a) == NUMBER.sub("", b)
                numbers = [[float(n) for n in NUMBER.findall(text)] for text in (a, b)]
                assert numbers[0] == pytest.approx(numbers[1], rel=1e-4)
            assert found == expected
    (model,) = read_results(tmp_path / "ours" / "short.jsonl")["models"]
    assert len(model["trials"]) == 6


def test_data_is_looked_for_beside_the_task_file(folder):
    (task,) = load_tasks(make_options(folder)).tasks.values()
    assert len(task.eval_docs) == 4
    (folder / "data/colors.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"task colors: its data .*colors.jsonl is not there"):
        load_tasks(make_options(folder))


@pytest.mark.parametrize(
    "place, text, message",
    [
        ("data/colors.jsonl", '{"question": 1', "lm_eval can't load colors: "),
        (
            "colors.yaml",
            COLORS.replace("test: data/colors.jsonl", "test: 3"),
            "3 is no path of data",
        ),
        (
            "colors.yaml",
            COLORS.replace("task: colors", "task: other"),
            "'colors' is not a registered",
        ),
    ],
)
def test_bad_data_and_bad_task_files_are_errors(folder, place, text, message):
    (folder / place).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_tasks(make_options(folder))


def test_a_group_is_run_as_one(folder):
    found = load_tasks(make_options(folder, tasks=("both",)))
    assert set(found.tasks) == {"colors", "shapes"}
    assert [root.name for root in found.roots] == ["both"]


def test_another_wording_is_another_question(folder):
    (task,) = load_tasks(make_options(folder)).tasks.values()
    before = fingerprint(task, folder)
    (folder / "colors.yaml").write_text(COLORS.replace("Question:", "Q:"))
    (task,) = load_tasks(make_options(folder)).tasks.values()
    assert fingerprint(task, folder) != before


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"include_path": Path("absent")}, "--include-path absent is no folder"),
        ({"tasks": ("colours",)}, "'colours' is not a registered .* and --include-path"),
    ],
)
def test_bad_task_files_are_named(folder, flags, message):
    with pytest.raises(ConfigError, match=message):
        load_tasks(make_options(folder, **flags))


def test_samples_that_were_not_written_are_told(tmp_path):
    with pytest.raises(ConfigError, match="has finished a of runs/x without it; remove"):
        check_samples(tmp_path, "runs/x", ["a"])
    place = folder_of(tmp_path, "runs/x")
    place.mkdir()
    (place / "samples_a_2026.jsonl").write_text("")
    check_samples(tmp_path, "runs/x", ["a"])
    with pytest.raises(ConfigError, match="has finished a_b of runs/x"):
        check_samples(tmp_path, "runs/x", ["a", "a_b"])


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "name one model"),
        ({"checkpoint": "a", "pretrained": "b"}, "name one model"),
        ({"checkpoint": "a", "size": 3}, "--model_args has size: rwkvx takes checkpoint, "),
        ({"checkpoint": "a", "top_k": 0}, "top_k is 0: it must be at least 1"),
        ({"checkpoint": "a", "piece": "x"}, "piece is 'x': it must be at least 1"),
        ({"checkpoint": "a", "selector": "best"}, "selector is 'best': it is one of mean"),
        ({"checkpoint": "a", "batch_size": "many"}, "--batch_size is 'many'"),
        ({"checkpoint": "a", "batch_size": 0}, "--batch_size is 0"),
        ({"checkpoint": "a", "max_batch_size": 4}, "--max_batch_size means nothing here"),
        ({"checkpoint": "a", "device": "cuda:7"}, "--device is 'cuda:7', and JAX computes on"),
    ],
)
def test_bad_model_arguments(given, message):
    with pytest.raises(ConfigError, match=message):
        Arguments.of(given)


def test_model_arguments_as_text(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    model = RwkvxModel.create_from_arg_string(f"checkpoint={checkpoint},top_k=1", {"batch_size": 2})
    assert model._tested.config.top_k == 1 and model._height == 2


@pytest.fixture
def chatting(tmp_path):
    return RwkvxModel(Arguments(checkpoint=str(write_checkpoint(tmp_path / "tiny.safetensors"))))


def test_chats_are_written_as_in_training(chatting, folder):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    asked = [*turns, {"role": "user", "content": "Why?"}]
    text = "User: Hi\n\nAssistant: Yes?\n\nUser: Why?\n\nAssistant:"
    assert chatting.apply_chat_template(asked) == text + " "
    assert chatting.apply_chat_template(turns, add_generation_prompt=False) == text[:25]
    assert chat_text(turns, ask=False) == "User: Hi\n\nAssistant: Yes?"
    (task,) = load_tasks(make_options(folder)).tasks.values()
    template = chatting.apply_chat_template
    task.build_all_requests(
        limit=1, rank=0, world_size=1, apply_chat_template=True, chat_template=template
    )
    context, answer = task.instances[0].args
    assert chatting._encode_pair(context, answer)[1] == chatting.tok_encode(" red")
    with pytest.raises(ConfigError, match="there is no chat template 'tools'"):
        chatting.chat_template("tools")
    with pytest.raises(ConfigError, match="turn 0: role 'tool' is none of"):
        chatting.apply_chat_template([{"role": "tool", "content": "x"}])


def test_an_answer_in_a_chat_ends_with_its_turn(chatting, monkeypatch):
    """Only there: a plain text may hold blank lines."""
    from lm_eval.api.instance import Instance

    from rwkvx_jax.evals.short import harness

    text, stopped = " Blue.\n\nUser: And now?", []

    class Reader:
        def __init__(self, tested, **_):
            self.tokenizer = tested.tokenizer

        def answer_all(self, rows, count, advance, ended):
            tokens = np.zeros(count, np.int32)  # 0 ends a document
            tokens[: len(text)] = self.tokenizer.encode(text)
            stopped.append(ended(tokens[: len(text)]))
            yield from enumerate([tokens] * len(rows))

    monkeypatch.setattr(harness, "GreedyReader", Reader)
    options = {"until": [], "max_gen_toks": 40}
    contexts = ["User: The sky?\n\nAssistant: ", "The sky?"]
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(c, options), idx=i)
        for i, c in enumerate(contexts)
    ]
    assert chatting.generate_until(requests) == ["Blue.", text]
    assert stopped == [True, False]


@pytest.mark.thorough
def test_a_chats_blank_belongs_to_the_answer(chatting):
    from lm_eval.api.instance import Instance

    options = {"until": [], "max_gen_toks": 4}
    contexts = ["User: Hi\n\nAssistant: ", "User: Hi\n\nAssistant:"]
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(c, options), idx=i)
        for i, c in enumerate(contexts)
    ]
    with_blank, without = chatting.generate_until(requests)
    assert with_blank == without.lstrip(" ")
