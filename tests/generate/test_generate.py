"""The engine against the model's own forward pass; streaming; one compilation; bad input."""

import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkvx_jax.cache import CachePolicy
from rwkvx_jax.config import ConfigError, ModelConfig, RunConfig
from rwkvx_jax.data.chat import chat_prompt, render_chat
from rwkvx_jax.generate import __main__ as cli
from rwkvx_jax.generate.engine import ENDED, Engine, NotFiniteError
from rwkvx_jax.generate.sampling import Sampling
from rwkvx_jax.generate.terminal import show
from rwkvx_jax.generate.texts import TextStream, generate
from rwkvx_jax.model import create_model, get_params, unstack, with_params
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


def _tokens(engine, prompts, count, seeds=None):
    session = engine.start(prompts, seeds)
    return np.stack(list(engine.stream(session, count, stop=())), axis=1)


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


SAMPLED = Sampling(0.9, 0.9, 0, 0.4, 0.3, 0.9)


@pytest.fixture(scope="module")
def sampled(model):
    """Engines of one and of three texts that draw, with penalties; at most 40 tokens a text."""
    return [Engine(model, max_length=40, batch=b, piece=16, sampling=SAMPLED) for b in (1, 3)]


def _turns(engine, prompts, more, seeds, stop):
    """Tokens of each text up to its end, twice: after the prompts, and after some more text."""
    session, rows = engine.start(prompts, seeds), [[] for _ in prompts]
    for feed in (None, more):
        if feed is not None:
            engine.feed(session, feed)
        for tokens in engine.stream(session, 12, stop):
            for row, token in zip(rows, tokens, strict=True):
                row += [int(token)] if token >= 0 else []
        rows = [[*row, -9] for row in rows]
    return rows, session.read


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(3))
def test_what_a_text_gets_does_not_depend_on_its_neighbours(sampled, seed):
    """Lengths, ends by a stop token, a full cache, seeds, penalties and what follows differ."""
    one, three = sampled
    rng = np.random.default_rng(seed)
    draw = lambda n: [int(t) for t in rng.integers(1, 257, n)]
    prompts = [draw(n) for n in rng.permutation([2, 12, int(rng.integers(20, 39))])]
    more = [draw(1 if len(prompt) == 2 else 0) for prompt in prompts]
    seeds, stop = [7, 8, 9], draw(40)
    together, read = _turns(three, prompts, more, seeds, stop)
    for i in range(3):
        alone, own = _turns(one, [prompts[i]], [more[i]], [seeds[i]], stop)
        assert together[i] == alone[0] and read[i] == own[0]
    assert len({len(row) for row in together}) > 1  # they end at different steps


def test_rewind_takes_back_penalties_and_random_keys(sampled):
    engine = sampled[1]
    session = engine.start([prompt[:20] for prompt in PROMPTS])
    list(engine.stream(session, 3, stop=()))
    mark = engine.mark(session)
    first = [list(map(int, row)) for row in engine.stream(session, 8, stop=())]
    later = engine.mark(session)
    engine.rewind(session, mark)
    assert [list(map(int, row)) for row in engine.stream(session, 8, stop=())] == first
    with pytest.raises(ConfigError, match="behind an earlier rewind"):
        engine.rewind(session, later)
    with pytest.raises(ConfigError, match="not of these texts"):
        engine.rewind(engine.start([[1]] * 3), mark)


def test_logits_that_are_not_finite_are_an_error_of_their_text(engine, sampled, monkeypatch):
    """One row of the embedding is damaged: who reads that token fails, the others go on."""
    for own in (engine, sampled[1]):
        good = [row[::2] for row in own.stream(own.start([[5, 6], [7], [9]]), 5, stop=(200,))]
        damaged = own.params | {"embed": own.params["embed"].at[200, 3].set(jnp.nan)}
        monkeypatch.setattr(own, "params", damaged)
        seen = []
        with pytest.raises(NotFiniteError, match="the model: the logits of prompt 1 .* 3 tokens"):
            for row in own.stream(own.start([[5, 6], [4, 200, 9], [9]]), 5, stop=(200,)):
                seen.append(row[::2])
                assert row[1] == ENDED
        np.testing.assert_array_equal(seen, good)


def test_pieces_of_any_length_give_the_same(model, engine):
    whole = Engine(model, max_length=64, batch=3, piece=41)
    a, b = engine.start(PROMPTS), whole.start(PROMPTS)
    assert_close(a.progress.logits, b.progress.logits, rel=1e-5)
    engine.feed(a, [[1, 2], [], [3]])
    b = whole.start([PROMPTS[0] + [1, 2], PROMPTS[1], PROMPTS[2] + [3]])
    assert_close(a.progress.logits, b.progress.logits, rel=1e-5)
    np.testing.assert_array_equal(a.read, b.read)


def test_compiles_once_and_donates(engine):
    session = engine.start(PROMPTS)
    before = session.cache.pages.keys
    for _ in range(3):
        engine.next_tokens(session)
    assert before.is_deleted()
    engine.start([[1]] * 3)
    assert engine._read._cache_size() == engine._step._cache_size() == 1


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
    stop = int(tokens[0, 3])
    first = [int(np.argmax(row == stop)) if stop in row else 8 for row in tokens]
    got = list(engine.stream(engine.start(PROMPTS), 8, stop=(stop,)))
    assert len(got) == max(first)
    for t, step in enumerate(got):
        for row in range(3):
            assert step[row] == (tokens[row, t] if t < first[row] else -1)


@pytest.mark.thorough
def test_policy_lifts_the_limit(model):
    engine = Engine(model, max_length=16, policy=CachePolicy(12, 8, 4), piece=8)
    assert _tokens(engine, [PROMPTS[0]], 6).shape == (1, 6)


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
    texts, speed = generate(engine, load_tokenizer("byte"), ["one", "two", "three"], 5)
    assert len(texts) == 3 and speed.prompt_tokens == 11 and speed.tokens <= 15
    assert "tokens/s" in str(speed)


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda e: e.start([[1] * 65, [1], [1]]), "65 tokens, more than max_length 64"),
        (lambda e: e.start([[1], [257], [1]]), "prompt 1 has token 257"),
        (lambda e: e.start([[1], [-1], [1]]), "prompt 1 has token -1"),
        (lambda e: e.start([[1], [], [1]]), "prompt 1 is empty"),
        (lambda e: e.start([[1]]), "1 prompts"),
        (lambda e: next(e.stream(e.start([[1]] * 3), 1, stop=(999,))), "stop token 999"),
        (lambda e: e.next_tokens(e.start([[1] * 64] * 3)), "all that the cache holds"),
    ],
)
def test_bad_input(engine, act, message):
    with pytest.raises(ConfigError, match=message):
        act(engine)


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
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    cli.main([*common, "--prompts-file", str(tmp_path / "p.txt")])
    assert capsys.readouterr().out.count("---") == 2
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
    fed = []

    class Fake:
        batch = 1

        def start(self, texts, seeds):
            fed.append(list(map(int, texts[0])))
            return SimpleNamespace(speed="fast")

        def feed(self, session, texts):
            fed.append(list(map(int, texts[0])))

        def stream(self, session, count, stop):
            yield from byte.encode(said)[:count, None]

    byte, turns = load_tokenizer("byte"), iter(["hello", ""])
    options = cli.Options(checkpoint=tmp_path, chat=True)
    cli._chat(Fake(), byte, options, lambda _: next(turns))
    ending = [] if closed.endswith("\n\n") else [byte.encode("\n\n").tolist()]
    assert fed == [byte.encode("User: hello\n\nAssistant:").tolist(), *ending]
    assert capsys.readouterr().out == f"Assistant:{closed.rstrip()}\n\n"


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
