"""Names for hidden values: adjective-noun pairs, numbers, uuids, and pronounceable names.

Kinds and forms are RULER's (arXiv 2404.06654); its word lists come from a package, these are ours.
"""

from __future__ import annotations

import uuid
from typing import Literal

import numpy as np

Kind = Literal["words", "numbers", "uuids"]

ADJECTIVES = (
    "able amber ancient autumn bitter bold brave brief bright broad calm careful cheerful "
    "clear clever cold cosmic crisp curious damp daring deep distant early eager easy empty "
    "faint fair famous fancy fast fierce final fine firm fond formal fresh frosty gentle "
    "giant glad golden grand grave great green happy hardy heavy hidden hollow honest humble "
    "icy idle jolly keen kind large late lavish lazy light little lively local lofty loud "
    "loyal lucky mellow merry mighty misty modest narrow neat new noble northern odd old open "
    "orange pale patient plain polite proud pure quick quiet rapid rare ready red rich robust "
    "rough round royal rural rustic sandy serene shady sharp shiny short silent silver simple "
    "sincere sleepy slow small smooth snowy soft solid southern spare steady steep stern "
    "still stout strange strong subtle sunny sweet swift tall tame tender thin tidy tiny "
    "tough vague vast velvet warm weary white wide wild windy wise witty young"
).split()

NOUNS = (
    "acorn anchor apple arrow avenue badge bakery balloon barrel basket beacon bench bicycle "
    "blanket boat bottle branch bread bridge bucket button cabin camera candle canyon carpet "
    "castle cellar chain chair chapel cherry circle cliff clock cloud coach comet compass "
    "copper corner cottage cradle crane crown crystal curtain dragon drawer drum eagle engine "
    "falcon feather fence fiddle field flame flute forest fountain garden gate glacier glove "
    "grove hammer harbor harvest hazel helmet hill horizon hotel island ivory jacket jewel "
    "journal jungle kettle kitchen ladder lake lamp lantern leaf lemon library lily lion "
    "lobby market marsh meadow melon mirror mountain museum needle oak ocean orchard otter "
    "oven owl oyster paddle palace panther parade parcel pasture pebble pencil pepper piano "
    "pillow pine pirate planet plaza pocket pond poplar portrait prairie puzzle quarry quilt "
    "rabbit raft rail raven reef ribbon ridge river robin rocket roof rose saddle sail salmon "
    "scarf school shadow shell ship shore signal sofa sparrow spice spoon spring stable "
    "station stone stream summit table temple thunder ticket tiger timber tower trail train "
    "tulip tunnel turtle valley vessel village violin wagon walnut water whale wheel willow "
    "window winter yard zebra"
).split()

_CONSONANTS, _VOWELS = "bdfgjklmnprstvz", "aeiou"


def draw(kind: Kind, rng: np.random.Generator) -> str:
    """A random adjective-noun pair, seven-digit number or uuid (version 4)."""
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    raise ValueError(f'kind is {kind!r}: choose "words", "numbers" or "uuids"')


def draw_distinct(kind: Kind, count: int, rng: np.random.Generator) -> list[str]:
    """So many different ones, in the order in which they were drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(kind, rng)] = None
    return list(found)


def draw_names(count: int, rng: np.random.Generator) -> list[str]:
    """Different names of five letters such as "badok", from 84,375."""
    found: dict[str, None] = {}
    while len(found) < count:
        letters = [str(rng.choice(list(_VOWELS if i % 2 else _CONSONANTS))) for i in range(5)]
        found["".join(letters)] = None
    return list(found)
