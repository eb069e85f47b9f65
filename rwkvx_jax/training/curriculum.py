"""The curriculum as a line of steps: where a step lies, and what happens between two stages."""

from __future__ import annotations

from typing import Any, NamedTuple

from jax.sharding import Mesh

from rwkvx_jax.config import ADAPTERS, Config, Stage
from rwkvx_jax.digest import flat
from rwkvx_jax.hosts import place
from rwkvx_jax.lora import merged, new_adapters
from rwkvx_jax.modules.trees import Params, select
from rwkvx_jax.training.expand import expand, with_indexers, with_initial_states
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

    The moments go on where the same parameters train in both stages; otherwise they start afresh.
    Adapters that do not go on are added to their matrices. A plain RWKV-7 is expanded if this stage
    wants the hybrid, and parameters that this stage adds (initial states, indexers, adapters)
    are made.
    """
    stage = config.stages[index]
    program = stage_program(config, stage, mesh)
    before = config.stages[index - 1] if index else None
    carried = before is not None and _trains_alike(before, stage)
    if before is not None and not carried:
        params = merged(params, before.lora)
    wanted = program.shardings.params
    if config.stage_model(stage).num_attention_blocks and "attention_blocks" not in params:
        # Onto the mesh first: from wherever the parameters come, they can then be copied there.
        here = {name for name, _ in flat(params)}
        params = place(params, select(wanted, here.__contains__))
        params = expand(params, config.model, fresh_shardings(wanted["attention_blocks"]))
    if config.model.learned_state:
        params = with_initial_states(params, config.model)
    if config.model.learned_selector and "attention_blocks" in params:
        params = with_indexers(params, config.model)
    if stage.trainable == "lora" and ADAPTERS not in params:
        shapes, seed = program.params[ADAPTERS], config.model.init_seed
        params = {**params, ADAPTERS: new_adapters(shapes, wanted[ADAPTERS], seed, index)}
    return program, program.start(params, opt_state if carried else None)


def _trains_alike(before: Stage, stage: Stage) -> bool:
    """Whether exactly the same parameters train in both stages."""
    return (
        before.trainable == stage.trainable
        and before.expanded == stage.expanded
        and (stage.trainable != "lora" or before.lora == stage.lora)
    )
