"""Local files of the short-context sets: checks, converters, and prompts equal to lm_eval's."""

import bz2
import json
from pathlib import Path

import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.evals.short import data as short_data
from rwkvx_jax.evals.short.convert import Options, convert, hellaswag_records
from tests.helpers import shared_path

RECORDS = {
    "lambada_openai": {"text": "He opened the door and saw the sea"},
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man cuts onions [step] slowly.",
        "ctx_b": "the man",
        "endings": ["eats.", "cries [title] loudly.", "sleeps.", "flies."],
        "label": "1",
    },
    "piqa": {"goal": "Boil water", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0},
    "arc_easy": {
        "question": "What is hot?",
        "choices": {"text": ["Ice", "Fire"], "label": ["A", "B"]},
        "answerKey": "B",
    },
    "winogrande": {
        "sentence": "The cup fell off the table because the _ was wet.",
        "option1": "cup",
        "option2": "table",
        "answer": "2",
    },
    "sciq": {
        "support": " Water boils at 100 degrees.",
        "question": "When does water boil?",
        "distractor1": "at 10",
        "distractor2": "at 20",
        "distractor3": "at 30",
        "correct_answer": "at 100",
    },
    "mmlu": {
        "question": "1 + 1?",
        "subject": "maths",
        "choices": ["1", "2", "3", "4"],
        "answer": 1,
    },
}
RECORDS["arc_challenge"] = RECORDS["arc_easy"]


def write(folder, **records):
    """Files of one or several records for each task; MMLU gets five examples."""
    folder.mkdir(exist_ok=True)
    for task, rows in records.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if "mmlu" in records:
        examples = [r for r in records["mmlu"][:1] for _ in range(5)]
        (folder / "mmlu_dev.jsonl").write_text("".join(json.dumps(r) + "\n" for r in examples))
    return folder


@pytest.mark.parametrize("task", short_data.TASKS)
def test_good_records_are_taken(task, tmp_path):
    write(tmp_path, **{task: [RECORDS[task]] * 2})
    records = short_data.read_records(tmp_path / f"{task}.jsonl", task)
    assert len(records) == 2 and RECORDS[task].keys() <= records[0].keys()


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("piqa", {"goal": None}, '"goal" is None: wrong type'),
        ("piqa", {"label": 2}, '"label" must be 0 or 1'),
        ("piqa", {"label": True}, '"label" is True'),
        ("hellaswag", {"endings": ["a"]}, "needs 4 endings"),
        ("hellaswag", {"label": 4}, "a label from 0 to 3"),
        ("arc_easy", {"answerKey": "C"}, "'C' is none of the labels"),
        ("arc_easy", {"choices": {"text": ["a"], "label": []}}, "lists of one length"),
        ("winogrande", {"sentence": "no place"}, "has no _ for the options"),
        ("winogrande", {"answer": "3"}, 'expected "1" or "2"'),
        ("mmlu", {"answer": 4}, "an answer from 0 to 3"),
        ("sciq", {"support": 1}, '"support" is 1: wrong type'),
    ],
)
def test_bad_records_are_named_with_file_and_line(task, change, message, tmp_path):
    write(tmp_path, **{task: [RECORDS[task], RECORDS[task] | change]})
    path = tmp_path / f"{task}.jsonl"
    with pytest.raises(ConfigError) as error:
        short_data.read_records(path, task)
    assert f"{path}, line 2: " in str(error.value) and message in str(error.value)


def test_malformed_lines_and_empty_files(tmp_path):
    path = tmp_path / "piqa.jsonl"
    for content, message in (
        ('{"goal": "x"\n', "line 1 is not JSON"),
        ("\n[1]\n", "line 2: expected an object with goal, sol1, sol2, label"),
        ('{"goal": "x"}\n', 'line 1: no field "sol1"'),
        ("\n\n", "is empty: it needs at least one record of piqa"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=message):
            short_data.read_records(path, "piqa")


def test_missing_files_are_all_named(tmp_path):
    write(tmp_path, piqa=[RECORDS["piqa"]])
    with pytest.raises(ConfigError) as error:
        short_data.check_files(tmp_path, ("piqa", "sciq", "mmlu"))
    for part in ("sciq.jsonl (sciq: support,", "mmlu.jsonl (mmlu: question,", "mmlu_dev.jsonl"):
        assert part in str(error.value)
    assert "piqa.jsonl" not in str(error.value)
    with pytest.raises(ConfigError, match="is no directory"):
        short_data.check_files(tmp_path / "absent", ("piqa",))


def lm_eval_folder() -> Path:
    return Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"


@pytest.mark.parametrize(
    "task, path",
    [
        ("lambada_openai", "lambada/lambada_openai.yaml"),
        ("piqa", "piqa/piqa.yaml"),
        ("arc_easy", "arc/arc_easy.yaml"),
        ("arc_challenge", "arc/arc_easy.yaml"),
        ("sciq", "sciq/sciq.yaml"),
        ("hellaswag", "hellaswag/hellaswag.yaml"),
        ("mmlu", "mmlu/default/_default_template_yaml"),
    ],
)
def test_prompts_and_metrics_are_lm_evals(task, path):
    import yaml

    # lm_eval's files name Python functions with a tag that only its own loader knows.
    text = (lm_eval_folder() / path).read_text().replace("!function", "")
    theirs = yaml.safe_load(text)
    ours = yaml.safe_load((Path(short_data.__file__).parent / f"tasks/{task}.yaml").read_text())
    fields = ("output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list")
    fields += ("fewshot_split", "fewshot_config")
    for field in fields:
        assert ours.get(field) == theirs.get(field), field
    assert ours["task"] == task and ours["num_fewshot"] == (5 if task == "mmlu" else 0)


def test_prepared_fields_are_lm_evals():
    from importlib import import_module

    lm_eval_folder()
    preprocess = import_module("lm_eval.tasks.hellaswag.utils").preprocess
    record = short_data.prepare(RECORDS["hellaswag"], "hellaswag")
    assert record["query"] == preprocess("Cooking: A man cuts onions [step] slowly. The man")
    assert record["query"] == "Cooking: A man cuts onions slowly. The man"
    assert record["choices"] == [preprocess(e) for e in RECORDS["hellaswag"]["endings"]]
    theirs = import_module("lm_eval.tasks.winogrande.preprocess_winogrande")
    record = short_data.prepare(RECORDS["winogrande"], "winogrande")
    assert record["correct"] == theirs.doc_to_text(RECORDS["winogrande"]) == 1
    assert record["ending"] == theirs.doc_to_target(RECORDS["winogrande"]) == "was wet."
    assert record["contexts"] == theirs.doc_to_choice(RECORDS["winogrande"])


def test_converting_icl_files(tmp_path):
    icl = {
        "piqa": {"query": "Question: Boil water\n", "choices": ["Heat it.", "Cool it."], "gold": 1},
        "arc_easy": {"query": "Question: What is hot?", "choices": ["Ice", "Fire"], "gold": 1},
        "lambada_openai": {"context": "He saw the", "continuation": "sea"},
        "winogrande": {
            "context_options": [
                "He put the cup off because the cup",
                "He put the cup off because the cat",
            ],
            "continuation": "was wet.",
            "gold": 0,
        },
    }
    write(tmp_path / "icl", **{task: [record] for task, record in icl.items()})
    counts = convert(Options(tmp_path / "out", icl=tmp_path / "icl"))
    assert counts == dict.fromkeys(icl, 1)
    read = lambda task: short_data.read_records(tmp_path / "out" / f"{task}.jsonl", task)[0]
    assert read("piqa") == {
        "goal": "Boil water",
        "sol1": "Heat it.",
        "sol2": "Cool it.",
        "label": 1,
    }
    assert read("arc_easy") == RECORDS["arc_easy"]
    assert read("lambada_openai") == {"text": "He saw the sea"}
    winogrande = read("winogrande")
    assert winogrande["sentence"] == "He put the cup off because the _ was wet."
    assert winogrande["contexts"] == icl["winogrande"]["context_options"]
    assert (winogrande["option1"], winogrande["option2"], winogrande["answer"]) == (
        "cup",
        "cat",
        "1",
    )


def test_converting_hellaswag_text(tmp_path):
    lines = ["Cooking: A man cuts. the man", "2", "a", "b", "c", "d"]
    lines += ["Home: How to cook: [title] Buy food. [step] Cook it.", "0", "e", "f", "g", "h"]
    path = tmp_path / "h.txt"
    path.write_text("\n".join(lines) + "\n")
    first, second = hellaswag_records(path)
    assert first == {
        "activity_label": "Cooking",
        "ctx_a": "A man cuts.",
        "ctx_b": "the man",
        "endings": ["a", "b", "c", "d"],
        "label": 2,
    }
    assert second["ctx_b"] == "" and second["ctx_a"].startswith("How to cook: [title]")
    packed = tmp_path / "h.txt.bz2"
    packed.write_bytes(bz2.compress(path.read_bytes()))
    assert hellaswag_records(packed) == [first, second]


def write_mmlu(folder, **files):
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
        for subject, text in files.items():
            (folder / split / f"{subject}_{split}.csv").write_text(text)
    return folder


def test_converting_mmlu_csv(tmp_path):
    rows = '"Which, of\nthese ""two""?",1,"2, or 3",4,5,B\nWhy?,a,b,c,d,D\n'
    folder = write_mmlu(tmp_path / "csv", college_maths=rows, anatomy="What?,a,b,c,d,A\n")
    assert convert(Options(tmp_path / "out", mmlu=folder)) == {"mmlu": 3}
    for name in ("mmlu", "mmlu_dev"):
        first, second, _ = short_data.read_records(tmp_path / "out" / f"{name}.jsonl", "mmlu")
        assert first["subject"] == "anatomy" and first["answer"] == 0
        assert second == {
            "question": 'Which, of\nthese "two"?',
            "subject": "college_maths",
            "choices": ["1", "2, or 3", "4", "5"],
            "answer": 1,
        }


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,1,2,3,4,B\nb,1,2,3,4,E\n", "x_test.csv, line 2: no row of MMLU"),
        ("a,1,2,3,B\n", "x_test.csv, line 1: no row of MMLU"),
        ('a,"1,2,3,4,B\n', "x_test.csv, line 1: no row of MMLU"),
    ],
)
def test_malformed_rows_of_mmlu_are_named(tmp_path, text, message):
    folder = write_mmlu(tmp_path / "csv", x=text)
    with pytest.raises(ConfigError, match=message):
        convert(Options(tmp_path / "out", mmlu=folder))
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_converted(tmp_path):
    with pytest.raises(ConfigError, match="no file test/SUBJECT_test.csv there"):
        convert(Options(tmp_path, mmlu=tmp_path))
    with pytest.raises(ConfigError, match="name a source"):
        convert(Options(tmp_path))
    with pytest.raises(ConfigError, match="holds none of lambada_openai"):
        convert(Options(tmp_path, icl=tmp_path))
    (tmp_path / "piqa.jsonl").write_text(
        '{"query": "x", "choices": ["a", "b"], "gold": 0}\n{"query": 3}\n'
    )
    with pytest.raises(ConfigError, match="piqa.jsonl, line 2: no MosaicML ICL record"):
        convert(Options(tmp_path / "out", icl=tmp_path))
    with pytest.raises(ConfigError, match="no such file"):
        convert(Options(tmp_path, hellaswag=tmp_path / "absent"))
    text = tmp_path / "h.txt"
    text.write_text("a: b\n1\nx\n")
    with pytest.raises(ConfigError, match="has 3 lines: expected six"):
        hellaswag_records(text)
    text.write_text("a: b\n1\nx\ny\nz\nw\na b\n1\nx\ny\nz\nw\n")
    with pytest.raises(ConfigError, match="line 7: expected"):
        hellaswag_records(text)


def test_converting_the_real_sets(tmp_path):
    icl = shared_path("data", "short_context")
    hellaswag = shared_path("data", "hellaswag_full_val", "hellaswag_val_full.txt.bz2")
    assert convert(Options(tmp_path, icl=icl, hellaswag=hellaswag)) == {
        "lambada_openai": 5153,
        "piqa": 1838,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "winogrande": 1267,
        "hellaswag": 10042,
    }
    source = (icl / "winogrande.jsonl").read_text().splitlines()
    made = short_data.read_records(tmp_path / "winogrande.jsonl", "winogrande")
    for line, record in zip(source, made, strict=True):
        assert json.loads(line)["context_options"] == record["contexts"]
        assert json.loads(line)["continuation"].strip() == record["ending"]
