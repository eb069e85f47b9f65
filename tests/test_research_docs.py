"""The programs of docs/research.md run as they stand, and do what the text around them says."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "research.md"


def programs() -> dict[str, str]:
    """The code of each section that has some, by its title."""
    sections = re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]
    found = {s.split("\n")[0]: re.findall(r"```python\n(.*?)```", s, re.S) for s in sections}
    assert all(len(blocks) <= 1 for blocks in found.values()), "one program a section"
    return {title: blocks[0] for title, blocks in found.items() if blocks}


def run(title: str) -> dict:
    names = {"__name__": "__main__"}
    exec(compile(programs()[title], f"{PAGE.name}: {title}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def free_promotion():
    """As in anyone's own script: the suite's stricter rules don't hold there."""
    import jax

    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", "raise")


def test_the_recurrence_in_another_model():
    names = run("The recurrence in another model")
    assert names["newest"] < 1e-5 and names["older"] < 1e-5


def test_another_selector():
    errors = run("Another selector")["errors"]
    assert errors["max"] < errors["mean"] < errors["recent"]


def test_a_custom_stage():
    names = run("A custom stage")
    assert names["history"][-1] < names["history"][0] - 0.05
