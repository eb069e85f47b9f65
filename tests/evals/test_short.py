"""The harness model and the short task: answers equal plain computation, few shapes, resumption."""

import json
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from rwkvx_jax.config import ConfigError, RunConfig  # noqa: E402
from rwkvx_jax.evals.models import EvalModel  # noqa: E402
from rwkvx_jax.evals.report import read_results  # noqa: E402
from rwkvx_jax.evals.short import batching, harness  # noqa: E402
from rwkvx_jax.evals.short import task as short_context  # noqa: E402
from rwkvx_jax.evals.short.answers import AnswerFile  # noqa: E402
from rwkvx_jax.evals.short.harness import HarnessModel  # noqa: E402
from rwkvx_jax.evals.short.table import NAMES, main_score, score, summarize  # noqa: E402
from rwkvx_jax.evals.short.task import ShortOptions, evaluate  # noqa: E402
from rwkvx_jax.model import abstract_model, with_params  # noqa: E402
from rwkvx_jax.tokenizer import load_tokenizer  # noqa: E402
from tests.evals.eval_models import (  # noqa: E402
    QUIET,
    TINY,
    random_params,
    run_command,
    write_checkpoint,
)
from tests.evals.test_short_data import RECORDS, write  # noqa: E402

BYTE = load_tokenizer("byte")
FLOAT32 = RunConfig(compute_dtype="float32")


@pytest.fixture(scope="module")
def tested():
    params = random_params(TINY)
    params["head"]["weight"][:, [0, *range(129, 257)]] = 0  # what it says is text
    return EvalModel("m", TINY, FLOAT32, params, BYTE, "x", None, None)


@pytest.fixture(scope="module")
def log_probs(tested):
    """The oracle: text -> log-probabilities [n, W] after each token of "line break + text", by one
    unbatched pass; padded to one length behind the text, which a causal model can't see."""
    model = with_params(abstract_model(TINY, FLOAT32), jax.tree.map(jnp.asarray, tested.params))
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))

    def run(text):
        tokens = BYTE.encode("\n" + text)
        padded = np.zeros((1, 160), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(padded))[0, : len(tokens)]

    return run


def make_model(tested, path, **flags):
    return HarnessModel(tested, AnswerFile(path / "answers.jsonl"), prefill_chunk=16, **flags)


def asked(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=argument, idx=i)
        for i, argument in enumerate(arguments)
    ]


@pytest.mark.thorough
def test_loglikelihoods_equal_unbatched_ones(tested, log_probs, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_STEP_TOKENS", 8)
    monkeypatch.setattr(harness, "_BATCH_TOKENS", {"cpu": 40})  # five lanes, several calls
    rng = np.random.default_rng(0)
    letters = lambda n: "".join(rng.choice(list("abc de"), n)).strip() + "x"
    pairs = [(letters(int(n)), " " + letters(int(m))) for n, m in rng.integers(1, 70, (40, 2))]
    greedy = BYTE.decode([int(log_probs("question")[-1].argmax())])
    pairs += [("question", answer) for answer in (" A", "A", "B", "C", "D", greedy)]
    pairs += [("", "alone"), ("ends in blanks  ", "word")]
    examples = letters(60)
    for question in (letters(30), letters(20), letters(9)):
        pairs += [(examples + question, " " + letters(int(n))) for n in (1, 2, 25, 7)]
    model = make_model(tested, tmp_path)
    answers = model.loglikelihood(asked("loglikelihood", *pairs))
    assert model.compilations == 1 and model.requests == len(set(pairs))
    for (context, continuation), (value, is_greedy) in zip(pairs, answers, strict=True):
        table = log_probs(context + continuation)
        targets = BYTE.encode(continuation)
        own = table[-len(targets) - 1 : -1]
        if context.endswith(" "):  # lm_eval counts these blanks to the continuation
            targets = BYTE.encode("  word")
            own = table[-len(targets) - 1 : -1]
        expected = own[np.arange(len(targets)), targets].sum()
        assert value == pytest.approx(expected, abs=1e-4)
        assert is_greedy == (own.argmax(-1) == targets).all()
    assert [g for _, g in answers].count(True) >= 1


@pytest.mark.thorough
def test_answers_are_found_again(tested, tmp_path):
    pairs = [("one", " two"), ("three", " four"), ("five", " six")]
    first = make_model(tested, tmp_path)
    two = first.loglikelihood(asked("loglikelihood", *pairs[:2]))
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('["torn')
    second = make_model(tested, tmp_path)
    three = second.loglikelihood(asked("loglikelihood", *pairs))
    assert three[:2] == two and (first.requests, second.requests) == (2, 1)
    third = make_model(tested, tmp_path)
    assert third.loglikelihood(asked("loglikelihood", *pairs)) == three and third.requests == 0
    for line, message in (
        ("nonsense", "line 2 is not JSON"),
        ('["c", [NaN, true]]', r"line 2: \[1\]\[0\] is not finite"),
        ("5", "line 2: no answer"),
        ('["c", [1.0]]', "line 2: no answer"),
    ):
        (tmp_path / "answers.jsonl").write_text(f'["a", 1.5]\n{line}\n["b", "x"]\n')
        with pytest.raises(ConfigError, match=message):
            make_model(tested, tmp_path)


def test_one_process_at_a_time_has_an_answers_file_open(tmp_path):
    path = tmp_path / "below" / "answers.jsonl"
    with AnswerFile.open(path) as answers:
        answers.add({"a": "x"})
        with pytest.raises(ConfigError, match="another evaluation writes .*answers.jsonl"):
            with AnswerFile.open(path):
                pass
    with AnswerFile.open(path) as answers:
        assert answers["a"] == "x"


@pytest.mark.slow
def test_requests_that_fail_lose_no_others(tested, tmp_path):
    """Empty continuations, settings that mean nothing, and logits that are not finite."""
    pairs = [("one", " two"), ("three", ""), ("five", " six")]
    model = make_model(tested, tmp_path)
    with pytest.raises(ConfigError, match=r"m, request \('three', ''\): the continuation is empty"):
        model.loglikelihood(asked("loglikelihood", *pairs))
    assert model.requests == 2
    good = model.loglikelihood(asked("loglikelihood", *pairs[::2]))
    assert model.requests == 2  # they were kept
    wrong = [{"do_sample": True, "temperature": 0.7}, {"max_gen_toks": "x"}, {"until": [3]}]
    requests = [("a", own) for own in [*wrong, {"max_gen_toks": None, "until": ["e"]}]]
    with pytest.raises(ConfigError, match="random sampling.* 2 more like it; all others are kept"):
        model.generate_until(asked("generate_until", *requests))
    assert model.requests == 3

    params = {**tested.params, "embed": tested.params["embed"].copy()}
    params["embed"][BYTE.encode("f")[0], 0] = np.nan
    (tmp_path / "answers.jsonl").unlink()
    damaged = make_model(tested._replace(params=params), tmp_path, batch=1)
    with pytest.raises(ConfigError, match=r"request \('five', ' six'\): its logits are not finite"):
        damaged.loglikelihood(asked("loglikelihood", *pairs[::2]))
    assert damaged.loglikelihood(asked("loglikelihood", pairs[0])) == [pytest.approx(good[0])]
    with pytest.raises(ConfigError, match=r"request \('off',\): its logits are not finite"):
        damaged.loglikelihood_rolling(asked("loglikelihood_rolling", ("off",), ("one",)))
    assert "NaN" not in (tmp_path / "answers.jsonl").read_text()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 2


@pytest.mark.thorough
def test_whole_texts(tested, log_probs, tmp_path):
    texts = ["a short one", "abc " * 30, ""]
    model = make_model(tested, tmp_path)
    values = model.loglikelihood_rolling(asked("loglikelihood_rolling", *[(t,) for t in texts]))
    for text, value in zip(texts, values, strict=True):
        targets = BYTE.encode(text)
        own = log_probs(text)[np.arange(len(targets)), targets]
        assert value == pytest.approx(own.sum(), abs=1e-4)


@pytest.mark.thorough
def test_generation_stops(tested, log_probs, tmp_path):
    def greedy(text, count):
        for _ in range(count):
            text += BYTE.decode([int(log_probs(text)[-1, 1:].argmax()) + 1])
        return text

    prompts = ["one", "a longer prompt of many words", "x"]
    ways = [greedy(p, 12)[len(p) :] for p in prompts]
    assert all(len(way) == 12 and "\ufffd" not in way for way in ways), "pick other prompts"
    stop = ways[0][5]
    requests = [(p, {"until": [stop], "max_gen_toks": 12}) for p in prompts]
    requests += [(prompts[1], {"until": [], "max_gen_toks": 4})]
    model = make_model(tested, tmp_path)
    answers = model.generate_until(asked("generate_until", *requests))
    assert answers[:3] == [way.split(stop)[0] for way in ways]
    assert answers[3] == ways[1][:4]
    with pytest.raises(ConfigError, match="random sampling"):
        model.generate_until(
            asked("generate_until", ("x", {"do_sample": True, "temperature": 0.7, "until": []}))
        )


def make_options(output, data_dir, **flags):
    return ShortOptions(checkpoint=(Path("m"),), output=output, data_dir=data_dir, **flags)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three records of every task; in the first ones of MMLU and SciQ the answers differ."""
    mmlu = [
        RECORDS["mmlu"] | {"subject": s, "answer": a} for s, a in (("b", 1), ("a_c", 0), ("b", 3))
    ]
    folder = write(
        tmp_path_factory.mktemp("short"),
        **{task: [record] * 3 for task, record in RECORDS.items()} | {"mmlu": mmlu},
    )
    examples = [
        RECORDS["mmlu"] | {"subject": s, "question": f"{i}?"}
        for s in ("a_c", "b")
        for i in range(6)
    ]
    (folder / "mmlu_dev.jsonl").write_text("".join(json.dumps(r) + "\n" for r in examples))
    return folder


def test_prompts_as_the_model_sees_them(data):
    tasks = short_context.load_tasks(make_options(data, data)).tasks
    prompts = {}
    for name, task in tasks.items():
        task.build_all_requests(limit=1, rank=0, world_size=1)
        prompts[name] = [instance.args for instance in task.instances]
    assert prompts["lambada_openai"] == [("He opened the door and saw the", " sea")]
    assert prompts["piqa"] == [
        ("Question: Boil water\nAnswer:", " Heat it."),
        ("Question: Boil water\nAnswer:", " Cool it."),
    ]
    assert prompts["arc_easy"][1] == ("Question: What is hot?\nAnswer:", " Fire")
    assert prompts["winogrande"] == [
        ("The cup fell off the table because the cup", " was wet."),
        ("The cup fell off the table because the table", " was wet."),
    ]
    assert prompts["sciq"][3] == (
        "Water boils at 100 degrees.\nQuestion: When does water boil?\nAnswer:",
        " at 100",
    )
    assert prompts["hellaswag"][1] == (
        "Cooking: A man cuts onions slowly. The man",
        " cries. loudly.",
    )
    assert sorted(name for name in prompts if name.startswith("mmlu")) == ["mmlu_a_c", "mmlu_b"]
    context, answer = prompts["mmlu_a_c"][2]
    one = lambda q, end: f"{q}?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:{end}"
    examples = "".join(one(i, " B\n\n") for i in range(5))
    head = "The following are multiple choice questions (with answers) about a c.\n\n"
    assert context == head + examples + one("1 + 1", "") and answer == " C"


@pytest.mark.thorough
def test_all_tasks_from_local_files(tested, data, tmp_path):
    results = evaluate(make_options(tmp_path, data), [tested], QUIET)
    assert "torch" not in sys.modules
    document = read_results(tmp_path / "short.jsonl")
    (shown,) = document["models"]
    assert len(shown["trials"]) == 24 and document["plan"]["documents"]["mmlu_b"] == 2
    columns = shown["summary"]["columns"]
    assert set(columns) == set(NAMES)
    assert {c["acc"]["documents"] for c in columns.values()} == {3}
    piqa = [t for t in shown["trials"] if t["task"] == "piqa"]
    first, second = piqa[0]["answers"]
    assert piqa[0]["metrics"]["acc"] == float(first[0] > second[0])
    norm = [first[0] / len("Heat it."), second[0] / len("Cool it.")]
    assert piqa[0]["metrics"]["acc_norm"] == float(norm[0] > norm[1])
    lambada = [t["answers"][0][0] for t in shown["trials"] if t["task"] == "lambada_openai"]
    assert columns["lambada_openai"]["perplexity"]["value"] == pytest.approx(
        np.exp(-np.mean(lambada)), rel=1e-6
    )
    average = np.mean(
        [100 * columns[c]["acc_norm" if c == "hellaswag" else "acc"]["value"] for c in columns]
    )
    assert shown["summary"]["average"] == pytest.approx(average)
    assert results.summary("m")["averaged"] == 8


@pytest.mark.thorough
def test_an_interrupted_run_loses_no_answer(tested, data, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, "_STEPS", 1)
    options = make_options(tmp_path, data, tasks=("piqa", "sciq", "arc_easy"), batch=1)
    calls = []

    def counted(call, sizes):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(call)
        return batching.pack(call, sizes)

    monkeypatch.setattr(harness, "pack", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(options, [tested], QUIET)
    (answers,) = (tmp_path / "short_answers").glob("*.jsonl")
    saved = answers.read_text().splitlines()
    assert 0 < len(saved) < 6  # of the first call: the second one was still running
    monkeypatch.setattr(harness, "pack", batching.pack)
    evaluate(options, [tested], QUIET)
    lines = answers.read_text().splitlines()
    assert lines[: len(saved)] == saved and len(set(lines)) == len(lines)
    monkeypatch.setattr(HarnessModel, "_compute", lambda *_: pytest.fail("nothing is left to do"))
    results = evaluate(options, [tested], QUIET)
    assert len(results.trials("m")) == 9


@pytest.mark.thorough
def test_limit_and_then_the_rest(tested, data, tmp_path):
    limited = evaluate(make_options(tmp_path, data, tasks=("piqa",), limit=2), [tested], QUIET)
    assert len(limited.trials("m")) == 2
    full = evaluate(make_options(tmp_path, data, tasks=("piqa", "sciq")), [tested], QUIET)
    assert len(full.trials("m")) == 6
    with pytest.raises(ConfigError, match="3 of its trials are not part of this command"):
        evaluate(make_options(tmp_path, data, tasks=("piqa",)), [tested], QUIET)


@pytest.mark.thorough
def test_other_data_under_the_same_name_is_refused(tested, data, tmp_path):
    evaluate(make_options(tmp_path, data, tasks=("piqa",)), [tested], QUIET)
    other = write(tmp_path / "other", piqa=[RECORDS["piqa"] | {"goal": "Freeze water"}] * 3)
    with pytest.raises(ConfigError, match="3 of its trials are not part of this command"):
        evaluate(make_options(tmp_path, other, tasks=("piqa",)), [tested], QUIET)


def test_every_filter_of_an_answer_is_kept():
    """As of gsm8k, whose answers lm_eval reads strictly and flexibly."""
    sample = {"doc_id": 3, "resps": [("7",)], "metrics": ["exact_match"]}
    samples = [
        sample | {"filter": name, "exact_match": i} for i, name in enumerate(("strict", "any"))
    ]
    (own,) = short_context._by_document(samples)
    metrics = short_context._trial("gsm8k", "d", own)["metrics"]
    assert metrics == {"exact_match,strict": 0, "exact_match,any": 1}
    assert short_context._trial("gsm8k", "d", own[:1])["metrics"] == {"exact_match": 0}


def test_summary_has_standard_errors():
    trials = [
        {"task": f"mmlu_{'ab'[i % 2]}", "metrics": {"acc": float(i == 0)}, "document": i}
        for i in range(4)
    ]
    acc = summarize(trials)["columns"]["mmlu"]["acc"]
    assert acc == {"value": 0.25, "error": pytest.approx(0.25), "documents": 4, "share": True}
    assert summarize([]) == {"columns": {}, "average": None, "averaged": 0}
    texts = [{"task": "t", "metrics": {"bits_per_byte": [-6.0, 4]}}] * 2
    bits = summarize(texts)["columns"]["t"]["bits_per_byte"]
    assert bits["value"] == pytest.approx(6 / 4 / math.log(2)) and not bits["share"]
    assert score(summarize(texts)) is None  # nothing that could be called per cent
    assert main_score({"t": {"bits_per_byte": bits}}, "t") == (bits["value"], None)
    hopeless = [{"task": "lambada_openai", "metrics": {"perplexity": -5000.0, "acc": 0.0}}]
    assert 1e304 < summarize(hopeless)["columns"]["lambada_openai"]["perplexity"]["value"] < 1e305


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"tasks": ()}, "--tasks is empty"),
        ({"tasks": ("piqa", "piqa")}, "names a task twice"),
        ({"tasks": ("piqa", "boolq")}, "the paper's tasks only, not boolq"),
        ({"fewshot": -1}, "--fewshot is -1"),
    ],
)
def test_bad_flags(flags, message, data, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make_options(tmp_path, data, **flags)


def test_missing_extra_and_missing_examples(data, tmp_path, monkeypatch):
    (tmp_path / "mmlu.jsonl").write_text((data / "mmlu.jsonl").read_text())
    (tmp_path / "mmlu_dev.jsonl").write_text(json.dumps(RECORDS["mmlu"]) + "\n")
    with pytest.raises(ConfigError, match="has 0 records of the subject a_c"):
        short_context.load_tasks(make_options(tmp_path, tmp_path, tasks=("mmlu",)))
    monkeypatch.setattr(short_context.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rwkvx-jax\[eval\]'"):
        short_context.check_installed()


@pytest.mark.thorough
def test_command(tmp_path, data, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "tiny.safetensors")
    flags = ["--checkpoint", checkpoint, "--output", tmp_path, "--data-dir", data]
    run_command(monkeypatch, "short", *flags, "--tasks", "piqa", "mmlu", "--limit", 2)
    printed = capsys.readouterr().out
    assert "MMLU" in printed and "average of 2" in printed and "±" in printed
    assert (tmp_path / "short.png").stat().st_size > 10_000
