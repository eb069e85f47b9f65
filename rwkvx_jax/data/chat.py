"""The chat template of RWKV-X fine-tuning, with the mask of what the model is to learn.

A conversation reads `User: ...\\n\\nAssistant: ...\\n\\n`. What the user says does not count in the
loss, nor do the tokens of `Assistant:`; the answer and its closing blank line, the sign to stop,
do.
"""

from __future__ import annotations

import numpy as np

from rwkvx_jax.tokenizer import Tokenizer

_SPEAKERS = {"system": "System:", "user": "User:", "assistant": "Assistant:"}


def render_chat(messages: list[dict], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of one conversation.

    Args:
      messages: turns such as {"role": "user", "content": "Hello"}; roles are system, user and
        assistant.
      tokenizer: the model's own.

    Returns:
      Tokens, int32 [N], closed by token 0, and mask, uint8 [N]: 1 where the token counts.

    Raises:
      ValueError: no turns, or a turn of another form.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is not a list of turns')
    tokens, mask = [], []
    for turn in messages:
        speaker, content = _turn(turn)
        said = tokenizer.encode(f" {content.strip()}\n\n")
        for piece, counts in ((tokenizer.encode(speaker), False), (said, speaker == "Assistant:")):
            tokens.append(piece)
            mask.append(np.full(len(piece), counts, np.uint8))
    tokens.append(np.asarray([tokenizer.end_of_document], np.int32))
    mask.append(mask[-1][-1:])
    return np.concatenate(tokens), np.concatenate(mask)


def _turn(turn: dict) -> tuple[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
        raise ValueError(f'the turn {turn!r} has no "content" string')
    if turn.get("role") not in _SPEAKERS:
        raise ValueError(f"role {turn.get('role')!r} is none of {sorted(_SPEAKERS)}")
    return _SPEAKERS[turn["role"]], turn["content"]
