"""The engine against the model's own forward pass; streaming; one compilation; bad input."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.cache import CachePolicy, cache_bytes
from rwkvx_jax.config import ConfigError, ModelConfig, RunConfig
from rwkvx_jax.data.chat import chat_prompt, render_chat
from rwkvx_jax.generate import __main__ as cli
from rwkvx_jax.generate.engine import Engine
from rwkvx_jax.generate.memory import rows_that_fit
from rwkvx_jax.generate.requests import Answer, NotFiniteError, Request
from rwkvx_jax.generate.sampling import Sampling
from rwkvx_jax.generate.terminal import show
from rwkvx_jax.generate.texts import TextStream, generate
from rwkvx_jax.model import abstract_model, create_model, get_params, unstack, with_params
from rwkvx_jax.tokenizer import load_tokenizer
from tests.helpers import assert_close

CONFIG = ModelConfig(
    vocab_size=257,
    num_blocks=2,
    num_attention_blocks=1,
    width=32,
    head_size=16,
    chunk_size=8,
    top_k=3,
)
PROMPTS = [list(range(5, 46)), [7, 9, 11], list(range(60, 89))]


@pytest.fixture(scope="module")
def model():
    """A model whose every parameter counts, zero-initialised ones included."""
    made = create_model(CONFIG, RunConfig(compute_dtype="float32"))
    leaves, tree = jax.tree.flatten(get_params(made))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [p + 0.2 * jax.random.normal(k, p.shape) for p, k in zip(leaves, keys, strict=True)]
    return with_params(made, jax.tree.unflatten(tree, noisy))


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, max_length=64, batch=3, piece=16)


def _tokens(engine, prompts, count, seeds=range(3), stop=()):
    """The answers in their order."""
    requests = [Request(p, count, stop, s) for p, s in zip(prompts, seeds, strict=False)]
    answers = {answer.number: answer for answer in engine.answer(requests)}
    return [answers[i].tokens for i in range(len(prompts))]


def test_greedy_is_argmax_of_the_whole_model(model, engine):
    tokens = _tokens(engine, PROMPTS, 10)
    forward = jax.jit(lambda tokens: model(tokens))
    for prompt, answer in zip(PROMPTS, tokens, strict=True):
        text = np.zeros(64, np.int32)  # one length, one compilation; what follows changes nothing
        text[: len(prompt) + 10] = [*prompt, *answer]
        logits = np.asarray(forward(text[None])[0])
        expected = logits[len(prompt) - 1 : len(prompt) + 9]
        best = np.sort(expected, axis=-1)
        clear = best[:, -1] - best[:, -2] > 1e-3  # no near-tie of two tokens
        assert clear.sum() >= 8
        np.testing.assert_array_equal(answer[clear], expected.argmax(-1)[clear])


@pytest.mark.thorough
def test_batch_equals_each_alone(model, engine):
    alone = Engine(model, max_length=64, batch=1, piece=16)
    together = _tokens(engine, PROMPTS, 8)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        np.testing.assert_array_equal(_tokens(alone, [prompt], 8)[0], answer)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(3))
def test_what_a_text_gets_does_not_depend_on_its_neighbours(model, seed):
    """Lengths, ends by a stop token, a full cache, seeds and penalties differ."""
    sampling = Sampling(0.9, 0.9, 0, 0.4, 0.3, 0.9)
    one, three = (
        Engine(model, max_length=40, batch=b, piece=16, sampling=sampling) for b in (1, 3)
    )
    rng = np.random.default_rng(seed)
    draw = lambda n: [int(t) for t in rng.integers(1, 257, n)]
    prompts = [draw(n) for n in rng.permutation([2, 12, int(rng.integers(20, 39))])]
    stop = draw(40)
    together = _tokens(three, prompts, 12, [7, 8, 9], stop)
    for i in range(3):
        alone = _tokens(one, [prompts[i]], 12, [7 + i], stop)
        np.testing.assert_array_equal(together[i], alone[0])
    assert len({len(row) for row in together}) > 1  # they end at different steps


def test_pieces_of_any_length_give_the_same(model):
    engines = [Engine(model, max_length=64, batch=3, piece=piece) for piece in (16, 41)]
    logits = []
    for engine in engines:
        engine.rows.read({row: np.asarray(text, np.int32) for row, text in enumerate(PROMPTS)})
        engine.rows.read({0: np.asarray([1, 2], np.int32), 2: np.asarray([3], np.int32)})
        np.testing.assert_array_equal(engine.rows.lengths, [43, 3, 30])
        logits.append(engine.rows.progress.logits)
    assert_close(*logits, rel=1e-5)


def test_compiles_once_and_donates(engine):
    before = engine.rows.cache.pages.keys
    _tokens(engine, PROMPTS, 3)
    assert before.is_deleted()
    _tokens(engine, [[1]] * 3, 3)
    _tokens(engine, [[1] * 30, [2] * 50], 3)
    programs = engine.rows.programs
    assert programs.read._cache_size() == 2 and programs.step._cache_size() == 1  # row, all rows


@pytest.mark.thorough
@pytest.mark.parametrize("attention", ["sparse", "full", "none"])
def test_unstacked_model_is_the_same(attention):
    config = {
        "sparse": CONFIG,
        "full": ModelConfig(**{**vars(CONFIG), "attention": "full"}),
        "none": CONFIG.without_attention(),
    }[attention]
    stacked = create_model(config, RunConfig(compute_dtype="float32"))
    layered = unstack(stacked)
    tokens = jnp.asarray([PROMPTS[0], PROMPTS[0][::-1]])
    results = []
    for model in (stacked, layered):
        read = jax.jit(lambda tokens, cache, model=model: model.prefill(tokens, cache))
        step = jax.jit(lambda token, cache, model=model: model.decode(token, cache))
        _, cache = read(tokens, model.init_cache(2, 48))
        results.append(step(tokens[:, 0], cache))
    jax.tree.map(lambda a, b: assert_close(a, b, rel=1e-5), *results)


@pytest.mark.thorough
def test_seed_decides_alone(model):
    engine = Engine(model, max_length=64, batch=3, piece=16, sampling=Sampling(temperature=1.0))
    same = [PROMPTS[1]] * 3
    a = _tokens(engine, same, 12, seeds=[4, 5, 4])
    np.testing.assert_array_equal(a[0], a[2])
    assert (a[0] != a[1]).any()
    np.testing.assert_array_equal(_tokens(engine, same, 12, seeds=[5, 0, 1])[0], a[1])


def test_stops_before_stop_token(model, engine):
    tokens = _tokens(engine, PROMPTS, 8)
    stop = int(tokens[0][3])
    for whole, got in zip(tokens, _tokens(engine, PROMPTS, 8, stop=(stop,)), strict=True):
        end = int(np.argmax(whole == stop)) if stop in whole else 8
        np.testing.assert_array_equal(got, whole[:end])


@pytest.mark.thorough
def test_policy_lifts_the_limit(model):
    engine = Engine(model, max_length=16, policy=CachePolicy(12, 8, 4), piece=8)
    assert len(_tokens(engine, [PROMPTS[0]], 6)[0]) == 6


def test_stream_never_breaks_a_character():
    tokenizer = load_tokenizer("byte")
    text = "aé漢🙂z"
    stream = TextStream(tokenizer)
    pieces = [stream.push(int(token)) for token in tokenizer.encode(text)]
    assert "".join(pieces) + stream.finish() == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[:4] == ["a", "", "é", ""]
    torn = TextStream(tokenizer)
    assert [torn.push(int(t)) for t in tokenizer.encode_bytes("é".encode()[:1])] == [""]
    assert torn.finish() == "\ufffd"


def test_generate_returns_texts_and_speed(model, engine):
    tokenizer = load_tokenizer("byte")
    texts, speed = generate(engine, tokenizer, prompts := ["one", "two", "three"], 5)
    answers = _tokens(engine, [tokenizer.encode(prompt) for prompt in prompts], 5, stop=(0,))
    assert (
        texts == [tokenizer.decode(answer) for answer in answers]
        and speed.prompt_tokens == 11
        and speed.tokens <= 15
    )
    assert "tokens/s" in str(speed)


def test_a_text_that_fails_is_an_error_when_the_others_are_whole(model):
    tokenizer = load_tokenizer("byte")
    engine = Engine(model, max_length=8, batch=2, piece=8)
    with pytest.raises(ConfigError, match="10 tokens, more than max_length 8"):
        generate(engine, tokenizer, ["0123456789", "b"], 3)
    engine.rows.params = engine.rows.params | {
        "embed": engine.rows.params["embed"].at[tokenizer.encode("a")[0], 3].set(jnp.nan)
    }
    with pytest.raises(NotFiniteError, match="the model: the logits of prompt 1 .* 2 tokens"):
        generate(engine, tokenizer, ["b", "ba", "c"], 3)


@pytest.mark.thorough
def test_command_line(model, tmp_path, monkeypatch, capsys):
    class Loaded:
        tokenizer, vocab_file = "byte", ""

    Loaded.model = model
    monkeypatch.setattr(cli, "load_checkpoint", lambda *_, **__: Loaded)
    common = ["--checkpoint", "x", "--max-tokens", "4", "--piece", "16", "--temperature", "0"]
    cli.main([*common, "--prompt", "ab"])
    out, err = capsys.readouterr()
    assert out.startswith("ab") and "generated" in err
    (tmp_path / "p.txt").write_text("three, which is long\none\ntwo\n")
    shown, made = [], []
    counted = lambda *given, batch, **named: (
        made.append(batch) or Engine(*given, batch=batch, **named)
    )
    monkeypatch.setattr(cli, "Engine", counted)
    for rows in ((), ("--batch", "1")):
        cli.main([*common, "--prompts-file", str(tmp_path / "p.txt"), *rows])
        shown.append(capsys.readouterr().out)
    assert made == [3, 1] and shown[0] == shown[1]  # in the order of the file
    assert shown[0].split("\n--- ")[0].startswith("--- 0\nthree, which is long")
    assert "\n--- 1\none" in shown[0] and "\n--- 2\ntwo" in shown[0]
    said = iter(["hello", "again", ""])
    options = cli.Options(checkpoint=tmp_path, chat=True, max_tokens=3, piece=16, max_length=200)
    cli.run(options, ask=lambda _: next(said))
    assert capsys.readouterr().out.count("Assistant:") == 2
    (tmp_path / "bad.txt").write_bytes(b"one\n\xff\n")
    (tmp_path / "gap.txt").write_bytes(b"one\n\ntwo")
    for bad, message in (
        (["--top-p", "0", "--prompt", "a"], "top_p is 0"),
        (["--temperature", "inf", "--prompt", "a"], "temperature is inf"),
        ([], "give either --chat"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "a\udcff"], "is not UTF-8"),
        (["--chat", "--prompt", "a"], "give either --chat"),
        (["--chat", "--batch", "2"], "--batch is of prompts"),
        (["--batch", "0", "--prompt", "a"], "--batch is 0"),
        (["--max-length", "3", "--prompt", "abc"], "leaves no room for an answer"),
        (["--vocab-file", "nowhere", "--prompt", "a"], "of the World tokenizer"),
        (["--seed", str(2**70), "--prompt", "a"], "between 0 and 4294967295"),
        (["--max-tokens", "999999999999", "--prompt", "a"], "a cache of 1,000,000,000,000 tokens"),
        (["--max-tokens", "999999999999", "--prompt", "a"], "ask for shorter texts"),
        (["--prompts-file", str(tmp_path / "bad.txt")], "line 2: not valid UTF-8"),
        (["--prompts-file", str(tmp_path / "gap.txt")], "line 2 is empty"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*common, *bad])
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.thorough
def test_command_line_on_several_devices(model, tmp_path, monkeypatch, capsys):
    class Loaded:
        tokenizer, vocab_file = "byte", ""

    Loaded.model = model
    monkeypatch.setattr(cli, "load_checkpoint", lambda *_, **__: Loaded)
    common = ["--checkpoint", "x", "--max-tokens", "4", "--piece", "16", "--temperature", "0"]
    common += ["--prompt", "ab", "--prompt", "a longer one", "--prompt", "b"]
    cli.main(common)
    alone = capsys.readouterr().out
    cli.main([*common, "--mesh.data", "4", "--mesh.context", "2"])
    assert capsys.readouterr().out == alone
    with pytest.raises(SystemExit):
        cli.main([*common, "--mesh.data", "3"])
    assert "asks for 3 devices, but there are 8" in " ".join(capsys.readouterr().err.split())


def test_as_many_rows_as_fit():
    model = abstract_model(CONFIG)
    one = cache_bytes(CONFIG, model.dtype, 1, 1000)
    fitting = [rows_that_fit(model, 8, 1000, None, free) for free in (0, 3 * one, 99 * one, None)]
    assert fitting == [1, 3, 8, 8]


def test_prompts_are_lines_and_nothing_else(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\nt\x0cw\xe2\x80\xa8o\n three")
    options = cli.Options(checkpoint=path, prompts_file=path, prompt=("zero",))
    assert options.prompts() == ["zero", "one", "t\x0cw\u2028o", " three"]


def test_a_turn_is_tokenized_as_in_training():
    """Blank lines are joined, and its pieces are those of data/chat.py."""
    byte = load_tokenizer("byte")
    said = byte.decode(byte.encode(chat_prompt(" a\n \n\t\nb\nc \n")))
    assert said == "User: a\nb\nc\n\nAssistant:"
    world = pytest.importorskip("pyrwkv_tokenizer") and load_tokenizer("world")
    tokens, mask = render_chat(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}], world
    )
    assert world.encode(chat_prompt("hi")).tolist() == tokens[: int(np.argmax(mask))].tolist()


@pytest.mark.parametrize("said, closed", [(" a\nb\n\nUser", " a\nb\n\n"), (" abc", " abc")])
def test_an_answer_ends_with_its_first_blank_line(monkeypatch, capsys, tmp_path, said, closed):
    held, byte = [], load_tokenizer("byte")

    class Fake:
        speed = "fast"

        def hold(self, prefix):
            held.append(list(map(int, prefix)))

        def answer(self, requests, ended):
            (request,) = requests
            held[-1] += map(int, request.prompt)
            tokens = byte.encode(said).tolist()
            count = range(1, len(tokens) + 1)
            cut = next((n for n in count if ended(0, tokens[:n])), len(tokens))
            yield Answer(0, np.asarray(tokens[:cut]))

    turns = iter(["hello", "more", ""])
    options = cli.Options(checkpoint=tmp_path, chat=True)
    cli._chat(Fake(), byte, options, lambda _: next(turns))
    begin = "User: hello\n\nAssistant:"
    later = f"{begin}{closed.rstrip()}\n\nUser: more\n\nAssistant:"
    assert held == [byte.encode(text).tolist() for text in (begin, later)]
    shown = f"Assistant:{closed.rstrip()}\n\n"
    assert capsys.readouterr().out == shown * 2


def test_a_terminal_is_steered_by_no_text():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = "a\x1b[31m\r\x07\x9b1m\tb\n漢\udcff"
    for stream, shown in (
        (Terminal(), "a\\x1b[31m\\r\\x07\\x9b1m\tb\n漢\\udcff"),
        (io.StringIO(), text),
    ):
        show(text, stream)
        assert stream.getvalue() == shown
