"""The chat template of RWKV-X fine-tuning, with the mask of what the model is to learn.

A conversation reads `User: ...\\n\\nAssistant: ...\\n\\n`: a blank line ends a turn, and no turn
holds another one. Template and mask are those of `sft/src/dataset.py` of RWKV-X (21452aa): what the
user says does not count in the loss, nor do the tokens of `Assistant:`; the answer and its closing
blank line, the sign to stop, do.
"""

from __future__ import annotations

import re
import reprlib

import numpy as np

from rwkvx_jax.tokenizer import Tokenizer

TEMPLATE = 2
"""Number of the template; raised when it changes, so that no run goes on with another one."""
TEMPLATE_TEXT = "User: {user}\\n\\nAssistant: {assistant}\\n\\n"
"""The template as results name it."""
TURN_END = "\n\n"
"""What ends a turn: no turn has one inside."""
_SPEAKERS = {"user": "User:", "assistant": "Assistant:"}
_BLANK_LINES = re.compile(r"\n\s*\n")  # the strings that the original's \n(\s*\n)+ matches


def render_chat(messages: list[dict], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask of one conversation.

    Args:
      messages: turns such as {"role": "user", "content": "Hello"}; roles are user and assistant,
        and system for the first turn, whose text goes before that of the user turn after it.
      tokenizer: the model's own.

    Returns:
      Tokens, int32 [N], closed by token 0, and mask, uint8 [N]: 1 where the token counts. Token 0
      does not: the original fills up with it behind the last turn.

    Raises:
      ValueError: no turns, or a turn of another form.
    """
    tokens, mask = [], []
    for speaker, text in _turns(messages):
        turn = tokenizer.encode(text)
        counts = np.full(len(turn), speaker == "Assistant:", np.uint8)
        counts[: len(tokenizer.encode(speaker))] = 0
        tokens.append(turn)
        mask.append(counts)
    tokens.append(np.asarray([tokenizer.end_of_document], np.int32))
    mask.append(np.zeros(1, np.uint8))
    return np.concatenate(tokens), np.concatenate(mask)


def chat_prompt(said: str, system: str = "") -> str:
    """Text that asks for an answer: the user's turn, and the beginning of the assistant's.

    Args:
      said: what the user says.
      system: what the model is to keep in mind; goes with the first turn of a conversation.

    Returns:
      Such as "User: Hello\\n\\nAssistant:". The answer ends at "\\n\\n", and the next prompt
      follows.
    """
    roles = {"system": system, "user": said}
    return chat_text([{"role": role, "content": content} for role, content in roles.items()])


def chat_text(messages: list[dict], ask: bool = True) -> str:
    """Text of a conversation that the model is to go on with.

    Args:
      messages: turns (see `render_chat`).
      ask: whether the beginning of the assistant's next turn follows; else the last turn stays
        open, without its closing blank line.

    Raises:
      ValueError: as `render_chat`.
    """
    turns = [*messages, {"role": "assistant", "content": ""}] if ask else messages
    text = "".join(text for _, text in _turns(turns))
    return text if ask else text.removesuffix(TURN_END)


def _turns(messages: list[dict]) -> list[tuple[str, str]]:
    """Speaker and whole text of each turn; an empty turn is its speaker's name alone."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is not a list of turns')
    pairs = [_checked(turn, number) for number, turn in enumerate(messages)]
    if pairs[0][0] == "system":
        if len(pairs) == 1 or pairs[1][0] != "user":
            raise ValueError("a system turn needs a user turn after it")
        system = pairs.pop(0)[1].strip()
        pairs[0] = ("user", f"{system}\n{pairs[0][1]}" if system else pairs[0][1])
    turns = []
    for role, content in pairs:
        content = _BLANK_LINES.sub("\n", content.strip())
        text = f"{_SPEAKERS[role]} {content}{TURN_END}" if content else _SPEAKERS[role]
        turns.append((_SPEAKERS[role], text))
    return turns


def _checked(turn: dict, number: int) -> tuple[str, str]:
    """Role and content of a turn."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
        raise ValueError(f'turn {number} has no "content" string')
    role = turn.get("role")
    if not isinstance(role, str):
        raise ValueError(f'turn {number} has no "role" string')
    if role.lower() == "system" and number > 0:
        raise ValueError(f"turn {number} is a system turn: only the first of a conversation may be")
    if role.lower() not in (*_SPEAKERS, "system"):
        known = "system, user and assistant"
        raise ValueError(f"turn {number}: role {reprlib.repr(role)} is none of {known}")
    return role.lower(), turn["content"]
