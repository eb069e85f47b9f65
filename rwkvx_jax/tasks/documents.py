"""What the makers of training documents return."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """A document that fills a training window."""

    tokens: np.ndarray  # int32 [seq_len + 1]
    answers: np.ndarray  # bool [seq_len + 1], tokens that have to be remembered


def document_of(parts: list[tuple[np.ndarray, bool]], length: int) -> Document:
    """The first `length` tokens of parts one after the other, each with whether it is an answer."""
    tokens = np.concatenate([part for part, _ in parts])
    answers = np.repeat([answer for _, answer in parts], [len(part) for part, _ in parts])
    return Document(tokens[:length], answers[:length])
