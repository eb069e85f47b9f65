"""Reads a torch pickle as data: a small interpreter of the few instructions that torch writes.

A pickle is a program. Python's own unpickler can be told which names to refuse, but not how much
memory or time the rest may take. This one has no instruction that runs, imports or allocates by a
number in the file: each pushes a value whose size is that of its bytes, and their number has a
limit. What torch never writes is refused. The instructions are described in Python's
`pickletools`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from rwkvx_jax.convert.tensors import ConversionError

_MOST_STEPS = 1 << 18  # torch takes about 35 for a tensor
_LONGEST_INTEGER = 8  # bytes


class PickleError(ValueError):
    """A pickle that contradicts itself or is damaged."""


class Global(NamedTuple):
    """A name of Python that a pickle mentions; only a name."""

    name: str


def read_pickle(
    data: bytes,
    functions: Mapping[str, Callable[..., Any]],
    opaque: Collection[str],
    persistent: Callable[[Any], Any],
) -> Any:
    """The object that a pickle describes.

    Args:
      data: the pickle, protocol 2 to 5.
      functions: what a pickle may call, by full name.
      opaque: further names that it may mention; they stay `Global`s.
      persistent: the object of a persistent id.

    Returns:
      Dicts (with keys that are strings or integers), lists, tuples, strings, numbers, booleans,
      None, and what `functions` and `persistent` return.

    Raises:
      ConversionError: another name, another instruction, or a damaged pickle.
    """
    reader = _Reader(data, functions, opaque, persistent)
    try:
        return reader.run()
    except ConversionError:
        raise
    except (PickleError, LookupError, TypeError, ValueError, struct.error) as error:
        raise ConversionError(f"its pickle cannot be read: {error}") from error


class _Reader:
    """State of the interpreter: what is still to read, the stack, and the memo."""

    def __init__(self, data, functions, opaque, persistent):
        self._data, self._at = data, 0
        self._functions, self._opaque, self._persistent = functions, opaque, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(_MOST_STEPS):
            instruction = self._take(1)
            if instruction == b".":
                return self._stack.pop()
            if instruction not in _INSTRUCTIONS:
                raise ConversionError(
                    f"its pickle has the instruction {instruction!r}, which torch does not write: "
                    "it was refused and nothing was executed"
                )
            _INSTRUCTIONS[instruction](self)
        raise ConversionError(f"its pickle has more than {_MOST_STEPS} instructions")

    def _take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise PickleError("it ends early")
        self._at += size
        return piece

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at)
        text = self._take(end - self._at).decode()
        self._at += 1
        return text

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def constant(self, value: Any) -> None:
        self._stack.append(value)

    def number(self, form: str) -> None:
        self._stack.append(self._number(form))

    def integer(self) -> None:
        size = self._number("<B")
        if size > _LONGEST_INTEGER:
            raise PickleError(f"an integer of {size} bytes")
        self._stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def text(self, form: str) -> None:
        self._stack.append(self._take(self._number(form)).decode())

    def skip(self, size: int) -> None:
        self._take(size)

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def pack(self, size: int | None = None) -> None:
        """A tuple of the last `size` values, or of those since the mark."""
        if size is None:
            values = self._since_mark()
        else:
            values = [self._stack.pop() for _ in range(size)][::-1]
        self._stack.append(tuple(values))

    def collect(self, kind: type) -> None:
        self._stack.append(kind())

    def append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise PickleError("items for what is no list")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(values) % 2:
            raise PickleError("items for what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):  # the hash of a nested tuple may take for ever
                raise PickleError("a key that is neither a string nor an integer")
            if key in target:
                raise PickleError(f"the key {key!r:.60} occurs twice")
            target[key] = value

    def remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def name(self, module: str, name: str) -> None:
        full = f"{module}.{name}"
        if full not in self._functions and full not in self._opaque:
            raise ConversionError(
                f"its pickle asks for {full[:200]}, which is not needed for plain tensors of "
                "ordinary dtypes: it was refused and nothing was executed. Save a plain dict of "
                "tensors (a state_dict) instead"
            )
        self._stack.append(Global(full))

    def stacked_name(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise PickleError("a name that is no string")
        self.name(module, name)

    def old_call(self) -> None:
        self.name(self._line(), self._line())
        raise PickleError("a call as torch does not write it")

    def call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not (isinstance(function, Global) and isinstance(arguments, tuple)):
            raise PickleError("a call of what is no function")
        if function.name not in self._functions:
            raise PickleError(f"a call of {function.name}")
        self._stack.append(self._functions[function.name](*arguments))

    def build(self) -> None:
        """Drops the state given to a dict, which is the metadata of a module."""
        self._stack.pop()
        if type(self._stack[-1]) is not dict:
            raise PickleError("a pickle may not modify anything but a dict")

    def load(self) -> None:
        self._stack.append(self._persistent(self._stack.pop()))


_INSTRUCTIONS: dict[bytes, Callable[[_Reader], None]] = {
    b"\x80": lambda r: r.skip(1),  # PROTO
    b"\x95": lambda r: r.skip(8),  # FRAME
    b"N": lambda r: r.constant(None),
    b"\x88": lambda r: r.constant(True),
    b"\x89": lambda r: r.constant(False),
    b"J": lambda r: r.number("<i"),
    b"K": lambda r: r.number("<B"),
    b"M": lambda r: r.number("<H"),
    b"G": lambda r: r.number(">d"),
    b"\x8a": lambda r: r.integer(),  # LONG1
    b"X": lambda r: r.text("<I"),
    b"\x8c": lambda r: r.text("<B"),
    b"(": lambda r: r.mark(),
    b")": lambda r: r.constant(()),
    b"t": lambda r: r.pack(),
    b"\x85": lambda r: r.pack(1),
    b"\x86": lambda r: r.pack(2),
    b"\x87": lambda r: r.pack(3),
    b"]": lambda r: r.collect(list),
    b"}": lambda r: r.collect(dict),
    b"a": lambda r: r.append([r._stack.pop()]),
    b"e": lambda r: r.append(r._since_mark()),
    b"s": lambda r: r.set_items([r._stack.pop(), r._stack.pop()][::-1]),
    b"u": lambda r: r.set_items(r._since_mark()),
    b"q": lambda r: r.remember(r._number("<B")),
    b"r": lambda r: r.remember(r._number("<I")),
    b"\x94": lambda r: r.remember(len(r._memo)),
    b"h": lambda r: r.recall(r._number("<B")),
    b"j": lambda r: r.recall(r._number("<I")),
    b"c": lambda r: r.name(r._line(), r._line()),
    b"i": lambda r: r.old_call(),
    b"\x93": lambda r: r.stacked_name(),
    b"R": lambda r: r.call(),
    b"b": lambda r: r.build(),
    b"Q": lambda r: r.load(),
}
