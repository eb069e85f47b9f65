"""The curriculum as a line of steps: where a step lies, and what happens between two stages."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.sharding import Mesh

from rwkvx_jax.config import Config
from rwkvx_jax.hosts import place
from rwkvx_jax.model import Params
from rwkvx_jax.training.expand import expand
from rwkvx_jax.training.step import StageProgram, TrainState, fresh_shardings, stage_program


class Position(NamedTuple):
    """A place in the curriculum: `stage_step` steps of stage `stage` are done."""

    stage: int
    stage_step: int

    def total(self, config: Config) -> int:
        """Steps done over all stages."""
        return sum(stage.steps for stage in config.stages[: self.stage]) + self.stage_step

    def tokens(self, config: Config) -> int:
        """Tokens taken in over all stages."""
        before = sum(stage.tokens for stage in config.stages[: self.stage])
        stage = config.stages[self.stage]
        return before + self.stage_step * stage.global_batch * stage.seq_len


def stage_ends(config: Config) -> list[int]:
    """Total steps at the end of each stage."""
    return [Position(i, s.steps).total(config) for i, s in enumerate(config.stages)]


def next_stage(
    config: Config, index: int, mesh: Mesh, params: Params, opt_state: Any | None
) -> tuple[StageProgram, TrainState]:
    """Program and state of stage `index`, from what the stage before it left.

    A plain RWKV-7 is expanded if this stage wants the hybrid. The moments go on where the same
    parameters train in both stages; otherwise they start afresh.
    """
    stage = config.stages[index]
    program = stage_program(config, stage, mesh)
    before = config.stages[index - 1] if index else None
    carried = (
        before is not None
        and before.trainable == stage.trainable
        and before.expanded == stage.expanded
    )
    if config.stage_model(stage).num_attention_blocks and "attention_blocks" not in params:
        wanted = dict(program.shardings.params)
        new = fresh_shardings(wanted.pop("attention_blocks"))
        # Onto the mesh first: from wherever the parameters come, they can then be copied there.
        params = expand(place(params, wanted), config.model, new)
    return program, program.start(params, opt_state if carried else None)
