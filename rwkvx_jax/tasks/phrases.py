"""Phrasings of facts and questions, in two parts: those of training, and those kept for evaluation.

A model that has seen one wording learns that wording. Here a fact is stated by an opening, a core
and a closing that are drawn apart, about one of many attributes, so that thousands of sentences say
the same kind of thing; and every list is split, so that no statement, question, attribute or name
of the evaluation has been trained on as a whole or in its parts. Neither part has the wording of
the passkey task or of RULER.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from rwkvx_jax.tasks.words import ADJECTIVES, NOUNS, draw, draw_names

Part = Literal["training", "evaluation"]

_EVERY = 4  # one word in so many is kept for evaluation


class Phrases(NamedTuple):
    """Lists to draw from; fields in braces are filled in: {what} an attribute, {who} its owner,
    {value} its value."""

    openings: tuple[str, ...]
    statements: tuple[str, ...]
    closings: tuple[str, ...]
    lines: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    attributes: tuple[str, ...]
    owners: tuple[str, ...]
    tasks: tuple[str, ...]


PHRASES: dict[Part, Phrases] = {
    "training": Phrases(
        openings=("", "", "", "Note: ", "Remember this. ", "By the way, ", "For later: ",
                  "As was said before, ", "It is written that ", "Mark this well: ",
                  "Somebody told me that ", "In the margin stood: "),
        statements=(
            "the {what} of {who} is {value}",
            "{who} has the {what} {value}",
            "{value} is the {what} of {who}",
            "the {what} that belongs to {who} reads {value}",
            "for {who} the {what} was set to {value}",
            "{who}'s {what} is {value}",
            "they gave {who} the {what} {value}",
            "one finds {value} as the {what} of {who}",
            "under {who} the list has {value} for the {what}",
            "whoever asks for the {what} of {who} will hear {value}",
            "with {who} goes the {what} {value}",
            "{who} was entered with {value} as {what}",
        ),
        closings=("", "", "", " Keep it in mind.", " You will be asked about it.",
                  " Nobody else knows.", " So much for that.", " Let us go on."),
        lines=("{who}: {value}", "{who} = {value}", "{who} -> {value}", "| {who} | {value} |",
               '"{who}": "{value}",', "{who}\t{value}", "[{who}] {value}", "({who}, {value})"),
        questions=(
            ("What is the {what} of {who}?", " The {what} of {who} is"),
            ("Which {what} has {who}?", " {who} has the {what}"),
            ("Tell me the {what} of {who}.", " It is"),
            ("{who}: which {what}?", " Answer:"),
            ("I forgot the {what} that belongs to {who}.", " That was"),
            ("Look up {who} and give its {what}.", " Found:"),
            ("Question: {what} of {who}", "\nAnswer:"),
            ("Do you remember {who}'s {what}?", " Yes, it is"),
            ("Complete the sentence.", " For {who} the {what} is"),
        ),
        attributes=("number", "code", "room", "locker", "extension", "badge", "seat", "order",
                    "ticket", "account", "serial number", "shelf", "license plate", "invoice",
                    "secret", "reply", "address", "label", "row", "batch", "customer number",
                    "door code", "flight", "track", "gate", "table", "size", "weight", "price",
                    "date"),
        owners=("{name}", "the {adjective} {noun}", "{adjective}-{noun}", "Mr. {Name}",
                "{noun} {name}", "the {noun}", "{Name}"),
        tasks=("", "", "Below is a text. Read it with care.\n", "Some facts are hidden here.\n",
               "I will ask you something at the end.\n", "Try to remember what matters.\n"),
    ),
    "evaluation": Phrases(
        openings=("", "Attention! ", "An aside: ", "Here is something to hold on to: ",
                  "According to the records, "),
        statements=(
            "anyone can see that {who} carries {value} as its {what}",
            "we registered the {what} {value} under the name of {who}",
            "{who} received {value}, which is now its {what}",
            "where {who} is concerned, {value} serves as {what}",
            "the clerk wrote {value} into the column {what} next to {who}",
        ),
        closings=("", " Do not lose it.", " That will come up again.", " End of the aside."),
        lines=("{who} => {value}", "<{who}>{value}</{who}>", "* {who} .... {value}",
               "set {who} {value}"),
        questions=(
            ("Could you repeat which {what} {who} carries?", " Of course:"),
            ("State the {what} registered under the name of {who}.", " That {what} is"),
            ("Now back to {who}. Its {what}, please!", " Here you are:"),
            ("And what did the clerk write next to {who} into the column {what}?",
             " The clerk wrote"),
        ),
        attributes=("call sign", "shipment", "password", "reference", "member number", "berth",
                    "queue position", "deposit", "token", "file"),
        owners=("Captain {Name}", "the house of {name}", "our {adjective} {noun}",
                "{noun} number {digit}", "{adjective} {name}"),
        tasks=("", "Please study the following pages.\n",
               "What you need to know is somewhere in this text.\n"),
    ),
}  # fmt: skip


def words(part: Part) -> tuple[list[str], list[str]]:
    """Adjectives and nouns of a part."""
    kept = lambda list_: [
        w for i, w in enumerate(list_) if (i % _EVERY == 0) == (part != "training")
    ]
    return kept(ADJECTIVES), kept(NOUNS)


def draw_owner(part: Part, rng: np.random.Generator) -> str:
    """Somebody or something that has an attribute."""
    adjectives, nouns = words(part)
    (name,) = draw_names(1, rng)
    return str(rng.choice(PHRASES[part].owners)).format(
        name=name,
        Name=name.capitalize(),
        adjective=rng.choice(adjectives),
        noun=rng.choice(nouns),
        digit=rng.integers(2, 10),
    )


def draw_value(part: Part, rng: np.random.Generator) -> str:
    """A number of 3 to 9 digits (half of all), a word, two to four words, or a uuid."""
    kind = rng.integers(8)
    if kind < 4:
        digits = int(rng.integers(3, 10))
        return str(rng.integers(10 ** (digits - 1), 10**digits))
    adjectives, nouns = words(part)
    if kind == 4:
        return str(rng.choice(nouns))
    if kind == 5:
        return draw_names(1, rng)[0]
    if kind == 6:
        return " ".join([*rng.choice(adjectives, int(rng.integers(1, 4))), str(rng.choice(nouns))])
    return draw("uuids", rng)
