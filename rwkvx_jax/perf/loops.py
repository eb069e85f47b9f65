"""How often each loop of a compiled program runs.

A `while` of the optimised program carries a tuple; one element counts, the condition compares it
with a bound. Start, step and bound are followed to constants through whatever the compiler put
between: copies, fusions, tuples of enclosing loops. A bound may depend on the counters of enclosing
loops (causal blocks do): then it is evaluated for their iterations and averaged. What depends on
data can't be known: an operation that has such a loop may state a mean that is never exceeded, as
`jax.named_scope("at_most_N_times")` around it, which the compiler keeps in the loop's name. A loop
with neither counts once, and is reported.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from rwkvx_jax.perf.hlo import Computation, Instruction, Module
from rwkvx_jax.perf.loop_arithmetic import (
    COMPARE,
    INTEGER,
    MIRRORED,
    Counter,
    Unknown,
    literal,
)

# Iterations of an enclosing loop that are evaluated for an average, evenly spaced.
SAMPLES = 128

_STATED = re.compile(r"\bat_most_(\d+)_times\)*/while$")  # in brackets of transformations
_SAME = ("copy", "bitcast", "convert", "reshape", "broadcast", "copy-done", "copy-start")


class Varying(Exception):
    """A value that depends on the counter of an enclosing loop, `frame`."""

    def __init__(self, frame: Frame):
        super().__init__()
        self.frame = frame


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A computation at one place where it is called.

    Attributes:
      computation: what runs.
      caller: the instruction that runs it; None for the entry.
      parent: frame of the caller.
      first: which operand of the caller is parameter 0.
    """

    computation: Computation
    caller: Instruction | None = None
    parent: Frame | None = None
    first: int = 0

    @property
    def is_loop(self) -> bool:
        return self.caller is not None and self.caller.opcode == "while"


@dataclasses.dataclass(frozen=True)
class Trips:
    """Iterations of a loop each time it is entered.

    Attributes:
      mean: their mean over all the times it is entered.
      basis: "constant", "average" (over enclosing loops), "stated" (an upper bound on the mean, by
        the operation), or "unknown" (counted once).
    """

    mean: float
    basis: str


def _stated(loop: Instruction) -> Trips:
    stated = _STATED.search(loop.op_name)
    return Trips(float(stated[1]), "stated") if stated else Trips(1.0, "unknown")


@dataclasses.dataclass(frozen=True)
class Env:
    """Where a value is wanted.

    Attributes:
      counters: values of the counters of enclosing loops, by the frame of their body.
      at: which entry of a one-dimensional array; None for scalars.
      memo: values found so far.
    """

    counters: Mapping[Frame, int] = dataclasses.field(default_factory=dict)
    at: int | None = None
    memo: dict[Any, int] = dataclasses.field(default_factory=dict, compare=False)

    def inside(self, loop: Frame, counter: int) -> Env:
        return Env({**self.counters, loop: counter}, self.at)

    def entry(self, at: int | None) -> Env:
        return Env(self.counters, at, self.memo)


class Loops:
    """The loops of a module."""

    def __init__(self, module: Module):
        self.module = module
        self.entry = Frame(module.computations[module.entry.name])
        self._frames: dict[tuple[Frame, str, str], Frame] = {}
        self._kept_elements: dict[tuple[Frame, int], bool] = {}

    def frame(self, parent: Frame, caller: Instruction, attribute: str) -> Frame:
        """The frame of a computation that `caller`, in `parent`, names in an attribute."""
        key = parent, caller.name, attribute
        if key not in self._frames:
            computation = self.module.computations[caller.called(attribute)]
            self._frames[key] = Frame(computation, caller, parent)
        return self._frames[key]

    def branches(self, parent: Frame, conditional: Instruction) -> list[Frame]:
        """The frames of a conditional's branches; operand 0 says which of them runs."""
        names = re.search(r"branch_computations=\{([^}]*)\}", conditional.attributes)
        if names:
            called = [name.strip().lstrip("%") for name in names[1].split(",")]
        else:
            called = [conditional.called(f"{x}_computation") for x in ("true", "false")]
        return [
            Frame(self.module.computations[name], conditional, parent, first=1 + number)
            for number, name in enumerate(called)
        ]

    def body(self, frame: Frame, loop: Instruction) -> Frame:
        return self.frame(frame, loop, "body")

    def trips(self, frame: Frame, loop: Instruction) -> Trips:
        """How often a `while` in `frame` runs its body."""
        body = self.body(frame, loop)
        count = lambda env: self.counter(body, env).count
        try:
            return Trips(float(count(Env())), "constant")
        except Varying:
            pass
        except Unknown:
            return _stated(loop)
        try:
            return Trips(self.average(count, Env()), "average")
        except Unknown:
            return _stated(loop)

    def average(self, value: Callable[[Env], float], env: Env) -> float:
        """Mean of a value over the iterations of the enclosing loops that it depends on."""
        try:
            return value(env)
        except Varying as varying:
            loop = varying.frame

        def over(env: Env) -> float:
            counter = self.counter(loop, env)
            if counter.count == 0:
                return 0.0
            taken = min(counter.count, SAMPLES)
            picks = [i * counter.count // taken for i in range(taken)]
            values = (
                self.average(value, env.inside(loop, counter.start + counter.step * i))
                for i in picks
            )
            return sum(values) / taken

        return self.average(over, env)

    def counter(self, body: Frame, env: Env) -> Counter:
        """The counter of the loop whose body is `body`, in an iteration of the enclosing ones."""
        loop = body.caller
        condition = self.frame(body.parent, loop, "condition")
        frame, test = self._inside(condition, condition.computation.root)
        if test.opcode != "compare":
            raise Unknown
        direction = test.attribute("direction")
        sides = [frame.computation.instructions[name] for name in test.operands]
        index = self._state(frame, sides[0], condition)
        if index is None:
            sides.reverse()
            direction = MIRRORED[direction]
            index = self._state(frame, sides[0], condition)
        if index is None:
            raise Unknown
        return Counter(
            index=index,
            start=self.element(body.parent, self._operand(body.parent, loop, 0), index, env),
            step=self._step(body, index, env),
            direction=direction,
            bound=self.value(frame, sides[1], env),
        )

    def _inside(self, frame: Frame, instruction: Instruction) -> tuple[Frame, Instruction]:
        """The operation that computes an instruction, inside the fusions around it."""
        while instruction.opcode in ("fusion", "call", *_SAME):
            if instruction.opcode in _SAME:
                instruction = self._operand(frame, instruction, 0)
            else:
                frame = self._called(frame, instruction)
                instruction = frame.computation.root
        return frame, instruction

    def _step(self, body: Frame, index: int, env: Env) -> int:
        frame, new = self._root_element(body, index)
        if new.opcode not in ("add", "subtract"):
            raise Unknown
        operands = frame.computation.operands(new)
        if self._state(frame, operands[0], body) != index:
            operands.reverse()
        if self._state(frame, operands[0], body) != index:
            raise Unknown
        step = self.value(frame, operands[1], env)
        return -step if new.opcode == "subtract" else step

    def _state(self, frame: Frame, instruction: Instruction, loop: Frame) -> int | None:
        """Which element of the loop's carried tuple an instruction is, if it is one that varies."""
        frame, instruction = self._source(frame, instruction)
        if instruction.opcode != "get-tuple-element" or frame is not loop:
            return None
        source = self._operand(frame, instruction, 0)
        index = int(instruction.attribute("index"))
        body = self.body(loop.parent, loop.caller)
        return index if source.opcode == "parameter" and not self._kept(body, index) else None

    def _source(self, frame: Frame, instruction: Instruction) -> tuple[Frame, Instruction]:
        """Follows copies, and parameters of fusions, to where a value comes from."""
        while True:
            if instruction.opcode in _SAME:
                instruction = self._operand(frame, instruction, 0)
            elif instruction.opcode == "parameter" and frame.parent and not frame.is_loop:
                number = frame.first + int(instruction.literal)
                instruction = self._operand(frame.parent, frame.caller, number)
                frame = frame.parent
            else:
                return frame, instruction

    def _kept(self, body: Frame, index: int) -> bool:
        """Whether the loop passes an element of its tuple on as it is."""
        if (body, index) not in self._kept_elements:
            self._kept_elements[body, index] = self._is_kept(body, index)
        return self._kept_elements[body, index]

    def _is_kept(self, body: Frame, index: int) -> bool:
        frame, new = self._root_element(body, index)
        frame, new = self._source(frame, new)
        return (
            frame is body
            and new.opcode == "get-tuple-element"
            and int(new.attribute("index")) == index
            and self._operand(frame, new, 0).opcode == "parameter"
        )

    def _root_element(self, body: Frame, index: int) -> tuple[Frame, Instruction]:
        root = body.computation.root
        if root.opcode != "tuple":
            raise Unknown
        new = self._operand(body, root, index)
        frame, new = self._inside(body, new)
        if new.opcode == "get-tuple-element":  # one of several results of a fusion
            source = self._operand(frame, new, 0)
            if source.opcode == "fusion":
                inner = self._called(frame, source)
                number = int(new.attribute("index"))
                return self._inside(inner, self._operand(inner, inner.computation.root, number))
        return frame, new

    def _called(self, frame: Frame, caller: Instruction) -> Frame:
        return self.frame(frame, caller, "calls" if caller.called("calls") else "to_apply")

    def _operand(self, frame: Frame, instruction: Instruction, number: int) -> Instruction:
        return frame.computation.instructions[instruction.operands[number]]

    def element(self, frame: Frame, source: Instruction, index: int, env: Env) -> int:
        """Element `index` of a tuple-valued instruction."""
        if source.opcode == "tuple":
            return self.value(frame, self._operand(frame, source, index), env)
        if source.opcode in ("copy", "optimization-barrier"):
            return self.element(frame, self._operand(frame, source, 0), index, env)
        if source.opcode == "fusion":
            inner = self._called(frame, source)
            return self.element(inner, inner.computation.root, index, env)
        if source.opcode == "while" and self._kept(self.body(frame, source), index):
            return self.element(frame, self._operand(frame, source, 0), index, env)
        if source.opcode == "parameter" and frame.is_loop:
            return self._carried(frame, index, env)
        if source.opcode == "parameter" and frame.parent:
            return self.element(*self._source(frame, source), index, env)
        raise Unknown

    def _carried(self, frame: Frame, index: int, env: Env) -> int:
        body = self.body(frame.parent, frame.caller)
        if self._kept(body, index):
            source = self._operand(frame.parent, frame.caller, 0)
            return self.element(frame.parent, source, index, env)
        if self.counter(body, env).index != index:
            raise Unknown
        if body not in env.counters:
            raise Varying(body)
        return env.counters[body]

    def value(self, frame: Frame, instruction: Instruction, env: Env) -> int:
        """An integer (or truth value, as 0 or 1) of the program.

        Raises:
          Unknown: it depends on data.
          Varying: it depends on the counter of a loop that `env` does not hold.
        """
        key = frame, instruction.name, env.at
        if key not in env.memo:
            env.memo[key] = self._value(frame, instruction, env)
        return env.memo[key]

    def _value(self, frame: Frame, instruction: Instruction, env: Env) -> int:
        operand = lambda number: self._operand(frame, instruction, number)
        opcode = instruction.opcode
        if opcode == "constant":
            return literal(instruction.literal, env.at)
        if opcode == "iota":
            return min(env.at or 0, instruction.array.elements - 1)
        if opcode == "broadcast":
            return self.value(frame, operand(0), env.entry(None))
        if opcode in _SAME:
            return self.value(frame, operand(0), env)
        if opcode == "get-tuple-element":
            return self.element(frame, operand(0), int(instruction.attribute("index")), env)
        if opcode in ("fusion", "call"):
            inner = self._called(frame, instruction)
            return self.value(inner, inner.computation.root, env)
        if opcode == "parameter" and frame.parent and not frame.is_loop:
            source, instruction = self._source(frame, instruction)
            return self.value(source, instruction, env)
        if opcode == "dynamic-slice" and len(instruction.operands) == 2:
            at = max(0, self.value(frame, operand(1), env.entry(None)))
            return self.value(frame, operand(0), env.entry(at))
        known = opcode == "compare" or opcode in INTEGER
        if not known or instruction.array.dtype[0] not in "sup":
            raise Unknown
        values = [self.value(frame, x, env) for x in frame.computation.operands(instruction)]
        if opcode == "compare":
            return int(COMPARE[instruction.attribute("direction")](*values))
        return INTEGER[opcode](*values)
