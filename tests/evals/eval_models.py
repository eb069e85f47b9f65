"""A model small enough for tests of the evaluations, and readers that need none."""

import io
import runpy
import sys

import jax
import numpy as np
from rich.console import Console

from rwkvx_jax.checkpoint import flat
from rwkvx_jax.config import ModelConfig, RunConfig
from rwkvx_jax.convert.own import write_own_safetensors
from rwkvx_jax.evals.models import EvalModel
from rwkvx_jax.model import abstract_model, get_params
from rwkvx_jax.tokenizer import load_tokenizer
from tests.helpers import ROOT

QUIET = Console(file=io.StringIO())

TINY = ModelConfig(
    vocab_size=257,
    num_blocks=2,
    num_attention_blocks=1,
    width=32,
    head_size=16,
    chunk_size=8,
    top_k=2,
)


def random_params(config):
    """Parameters drawn in NumPy: no compilation, and attention matters (fresh models zero it)."""
    rng = np.random.default_rng(0)
    draw = lambda p: (0.3 * rng.standard_normal(p.shape)).astype(np.float32)
    return jax.tree.map(draw, get_params(abstract_model(config)))


def write_checkpoint(path, config=TINY, tokenizer="byte"):
    """A .safetensors of random parameters; returns its path."""
    write_own_safetensors(path, config, tokenizer, dict(flat(random_params(config))))
    return path


def make_model(label="model", tokenizer="byte", scale=1.0, **facts):
    """A model whose parameters no reader looks at."""
    params = {"embed": np.full(3, scale, np.float32), "attention_blocks": {"x": np.zeros(2)}}
    facts = {"step": 70, "trained_length": 128} | facts
    return EvalModel(
        label, TINY, RunConfig(), params, load_tokenizer(tokenizer), "runs/model", **facts
    )


class FakeReader:
    """A factory of readers that answer with what `solve` makes of the prompt's text."""

    def __init__(self, solve, stop_after=None):
        self.solve, self.stop_after, self.read = solve, stop_after, []

    def __call__(self, tested, *, prefill_chunk, batch, longest, policy):
        def answer(prompts, count, advance, ended):
            assert 0 < len(prompts) <= batch
            if self.stop_after is not None and len(self.read) >= self.stop_after:
                raise KeyboardInterrupt
            texts = [tested.tokenizer.decode(prompt) for prompt in prompts]
            self.read += [(tested.label, text) for text in texts]
            advance(sum(map(len, prompts)))
            rows = [tested.tokenizer.encode(self.solve(text)) for text in texts]
            return np.stack([np.resize(row, count) for row in rows])

        return answer


def run_command(monkeypatch, *flags):
    """Runs eval.py as a command."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
