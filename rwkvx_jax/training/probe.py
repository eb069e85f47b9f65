"""Passkey probe: the share of held-out keys that a model reads back during training.

An answer counts when every one of its tokens is the most likely one after the right beginning,
which is when greedy decoding gives exactly that answer; so one forward pass per prompt suffices.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.model import RWKVX
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.sharding import constrain
from rwkvx_jax.tasks.passkey import answer_tokens, eval_key, exact_prompt
from rwkvx_jax.tokenizer import Tokenizer


def make_probe(
    bind: Callable[[Params], RWKVX], tokenizer: Tokenizer, length: int, trials: int, seed: int
) -> Callable[[Params], float]:
    """A function from parameters to accuracy in [0, 1].

    Args:
      bind: gives the model of parameters.
      tokenizer: the model's own.
      length: tokens of prompt and answer together.
      trials: prompts, their depths spread evenly over the text.
      seed: of the keys, drawn from those never trained on.
    """
    rng = np.random.default_rng(seed)
    rows, answers = [], []
    for trial in range(trials):
        answer = answer_tokens(tokenizer, key := eval_key(rng))
        depth = trial / max(1, trials - 1)
        prompt = exact_prompt(tokenizer, key, length - len(answer), depth)
        rows.append(np.concatenate([prompt, answer]))
        answers.append(len(answer))

    @jax.jit
    def right(params: Params, tokens: jax.Array) -> jax.Array:
        count = max(answers)
        bound = bind(params)
        logits = bound.head(bound.features(tokens[None])[:, -count - 1 : -1])
        return constrain(jnp.argmax(logits[0], -1) == tokens[-count:], None)  # whole on all hosts

    def probe(params: Params) -> float:
        hits = [
            bool(np.asarray(right(params, row))[-n:].all())
            for row, n in zip(rows, answers, strict=True)
        ]
        return float(np.mean(hits))

    return probe
