"""Train step and held-out step of one stage, jitted over a mesh.

Only trainable parameters get gradients and moments. A bad step (a loss, gradient, parameter or
moment that is not finite, a spike of the gradient, or a batch in which no token counts) leaves
parameters and moments as they were and is counted; the caller decides what to do about it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rwkvx_jax.config import Config, ModelConfig, Stage
from rwkvx_jax.hosts import place
from rwkvx_jax.lora import attached, stage_params
from rwkvx_jax.model import RWKVX, abstract_model, create_model, get_params, param_axes, with_params
from rwkvx_jax.modules.trees import Params, joined, select
from rwkvx_jax.sharding import batch_sharding, mesh_in_force, named_sharding, replicated
from rwkvx_jax.training.losses import (
    longce_weights,
    selecting_queries,
    target_mask,
    token_losses,
    token_weights,
)
from rwkvx_jax.training.optimizer import (
    learning_rate,
    make_optimizer,
    rate_factors,
    treatments,
)

Batch = dict[str, jax.Array]

_NORM_MEMORY = 0.98  # of the running mean of the gradient norm: about 50 steps


class Guard(NamedTuple):
    """What tells good steps from bad ones; starts afresh with each stage."""

    grad_norm_ema: jax.Array  # float32, running mean of the gradient norm; 0 before the first step
    skipped: jax.Array  # int32, bad steps of the stage
    consecutive_skips: jax.Array  # int32, bad steps since the last good one

    @classmethod
    def start(cls) -> Guard:
        return cls(jnp.float32(0), jnp.int32(0), jnp.int32(0))

    def watch(
        self, sound: jax.Array, norm: jax.Array, spike_factor: float
    ) -> tuple[jax.Array, Guard]:
        """Whether a step with this gradient norm is good, and the guard after it.

        Args:
          sound: bool, nothing else speaks against the step.
          norm: float32, of its gradient.
          spike_factor: of `RunConfig`.
        """
        good = sound & jnp.isfinite(norm)
        if spike_factor:
            good &= (self.grad_norm_ema == 0) | (norm <= spike_factor * self.grad_norm_ema)
        mean = _NORM_MEMORY * self.grad_norm_ema + (1 - _NORM_MEMORY) * norm
        mean = jnp.where(self.grad_norm_ema == 0, norm, mean)
        bad = 1 - good.astype(jnp.int32)
        return good, Guard(
            jnp.where(good, mean, self.grad_norm_ema),
            self.skipped + bad,
            bad * (self.consecutive_skips + 1),
        )


# Of the fields of a guard, in checkpoints; other names would not read those that exist.
STORED_GUARD = ("usual_norm", "skipped", "in_row")


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array  # int32, steps done in this stage
    params: Params
    opt_state: Any  # of the trainable parameters only
    guard: Guard

    def stored_optimizer(self) -> dict[str, Any]:
        """`opt_state` and `guard` under the names by which checkpoints hold them."""
        names = dict(zip(Guard._fields, STORED_GUARD, strict=True))
        guard = {names[field]: value for field, value in self.guard._asdict().items()}
        return {"moments": self.opt_state, "guard": guard}


def from_stored_optimizer(stored: dict[str, Any]) -> tuple[Any, Guard]:
    """`opt_state` and `guard` of `TrainState.stored_optimizer`."""
    return stored["moments"], Guard(*(stored["guard"][name] for name in STORED_GUARD))


def split_trainable(params: Params, stage: Stage) -> tuple[Params, Params]:
    """(trainable, frozen) parts of a parameter tree; `joined` puts them together again."""
    return select(params, stage.trains), select(params, lambda name: not stage.trains(name))


@dataclass(frozen=True)
class StageProgram:
    """The compiled functions of a stage and the shardings of its state."""

    model: RWKVX  # abstract
    stage: Stage
    params: Params  # shapes and dtypes, of adapters too
    optimizer: optax.GradientTransformation
    shardings: TrainState  # a sharding for each array
    init_opt_state: Callable[[Params], Any]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[[Params, Batch], tuple[jax.Array, jax.Array]]

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state: the target of a restore."""
        trainable, _ = split_trainable(self.params, self.stage)
        state = TrainState(
            jax.eval_shape(lambda: jnp.int32(0)),
            self.params,
            jax.eval_shape(self.optimizer.init, trainable),
            jax.eval_shape(Guard.start),
        )
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            self.shardings,
        )

    def start(
        self,
        params: Params,
        opt_state: Any | None,
        *,
        step: int = 0,
        guard: Guard | None = None,
    ) -> TrainState:
        """The state after `step` steps of the stage; None makes fresh moments, or a fresh guard."""
        params = place(params, self.shardings.params)
        if opt_state is None:
            opt_state = self.init_opt_state(split_trainable(params, self.stage)[0])
        opt_state = place(opt_state, self.shardings.opt_state)
        counts = jnp.int32(step), guard or Guard.start()
        counts = place(counts, (self.shardings.step, self.shardings.guard))
        return TrainState(counts[0], params, opt_state, counts[1])


def bind(model: RWKVX, params: Params, stage: Stage) -> RWKVX:
    """The abstract model of a stage around the stage's parameters, adapters at work."""
    return with_params(model, attached(params, stage.lora))


def param_shardings(model: RWKVX, mesh: Mesh) -> Params:
    """Sharding of every parameter of an abstract model; errors name the parameter."""
    return shardings_of(get_params(model), param_axes(model), mesh)


def placed_params(model: RWKVX, params: Params) -> Params:
    """Parameters of an abstract model on the device, or over the mesh in force.

    Raises:
      ConfigError: a mesh that does not divide them.
    """
    mesh = mesh_in_force()
    return jax.device_put(params) if mesh is None else place(params, param_shardings(model, mesh))


def shardings_of(shapes: Params, axes: Params, mesh: Mesh) -> Params:
    """Sharding of every parameter by its shape and logical axes; errors name the parameter."""

    def one(path: tuple, leaf: jax.ShapeDtypeStruct, leaf_axes: tuple[str, ...]):
        name = ".".join(key.key for key in path)
        return named_sharding(mesh, leaf_axes, leaf.shape, name)

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


def initial_params(config: ModelConfig, mesh: Mesh) -> Params:
    """Freshly initialised parameters of a model."""
    shardings = fresh_shardings(param_shardings(abstract_model(config), mesh))
    return jax.jit(lambda: get_params(create_model(config)), out_shardings=shardings)()


def fresh_shardings(shardings: Params) -> Params | None:
    """Where parameters with these shardings are made: each device makes its own part.

    On CPUs every process makes them whole, on one device (None): matrix factorisations that run on
    several simulated devices at once wait for each other's threads (see `modules/parameters.py`).
    """
    device = next(iter(jax.tree.leaves(shardings)[0].device_set))
    return None if device.platform == "cpu" else shardings


def stage_program(config: Config, stage: Stage, mesh: Mesh) -> StageProgram:
    """Builds the functions of a stage; nothing is compiled before the first call."""
    model = abstract_model(config.stage_model(stage), config.run)
    params, axes = stage_params(model, stage)
    plan, _ = split_trainable(treatments(config.optimizer.policy, axes), stage)
    optimizer = make_optimizer(config.optimizer, plan)
    shardings = shardings_of(params, axes, mesh)
    trainable, _ = split_trainable(shardings, stage)
    shapes, _ = split_trainable(params, stage)
    opt_shardings = optax.tree_utils.tree_map_params(
        # Abstractly: under a mesh of devices that are not here nothing can be computed.
        lambda params: jax.eval_shape(optimizer.init, params),
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        trainable,
        transform_non_params=lambda _: replicated(mesh),
    )
    everywhere: Any = replicated(mesh)
    guard = Guard(everywhere, everywhere, everywhere)
    state_shardings = TrainState(everywhere, shardings, opt_shardings, guard)
    batch = batch_sharding(mesh, stage.global_batch)
    return StageProgram(
        model=model,
        stage=stage,
        params=params,
        optimizer=optimizer,
        shardings=state_shardings,
        init_opt_state=jax.jit(optimizer.init, out_shardings=opt_shardings),
        train_step=jax.jit(
            _train_step(config, stage, model, optimizer, rate_factors(plan)),
            in_shardings=(state_shardings, batch),
            out_shardings=(state_shardings, replicated(mesh)),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            _eval_step(config, stage, model),
            in_shardings=(shardings, batch),
            out_shardings=replicated(mesh),
        ),
    )


def _objective(config: Config, stage: Stage, model: RWKVX) -> Callable:
    """loss(trainable, frozen, tokens, weights, segment_ids) -> (objective, its terms); segment_ids
    may be None. All are sums over parts of the batch: weighted ones over tokens, and shares of the
    mean over all choices of chunks."""
    block = config.run.loss_block
    choices = stage.global_batch * selecting_queries(model.config, stage.seq_len)

    def loss(trainable: Params, frozen: Params, tokens, weights, segment_ids):
        params = joined(frozen, trainable)
        bound = bind(model, params, stage)
        losses = token_losses(bound, tokens, block, segment_ids, stage.selection_loss > 0)
        factors = weights
        if stage.loss == "longce":
            fixed = bind(model, jax.lax.stop_gradient(params), stage)

            def short(tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
                losses = token_losses(fixed, tokens, block, segment_ids, skip=stage.longce.window)
                return losses.cross_entropy

            full = jax.lax.stop_gradient(losses.cross_entropy)
            factors = weights * longce_weights(short, tokens, full, stage.longce, segment_ids)
        total = jnp.sum(factors * losses.cross_entropy)
        if stage.l2wrap:
            total += stage.l2wrap * jnp.sum(weights * losses.squared_max)
        terms = {"loss": jnp.sum(weights * losses.cross_entropy)}
        if losses.selection is not None:
            terms["selection_loss"] = losses.selection / choices
            total += stage.selection_loss * terms["selection_loss"]
        return total, terms

    return loss


def _train_step(config, stage, model, optimizer, factors) -> Callable:
    value_and_grad = jax.value_and_grad(_objective(config, stage, model), has_aux=True)
    schedule = learning_rate(stage)

    def gradients(trainable: Params, frozen: Params, batch: Batch):
        segment_ids = batch.get("segment_ids")
        weights = token_weights(batch["mask"], stage.loss_average, segment_ids)
        rows = batch["tokens"], weights, segment_ids
        if stage.accumulation == 1:
            return value_and_grad(trainable, frozen, *rows)

        def part(total, xs):
            return jax.tree.map(jnp.add, total, value_and_grad(trainable, frozen, *xs)), None

        # Part i takes every accumulation-th row, so that each part stays spread over the devices.
        parts = lambda x: x.reshape(-1, stage.accumulation, *x.shape[1:]).swapaxes(0, 1)
        rows = jax.tree.map(parts, rows)
        one = jax.tree.map(lambda x: x[0], rows)
        values, _ = jax.eval_shape(value_and_grad, trainable, frozen, *one)
        zeros = jax.tree.map(jnp.zeros_like, (values, trainable))
        return jax.lax.scan(part, zeros, rows)[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        batch = _without_borders(batch)
        trainable, frozen = split_trainable(state.params, stage)
        (loss, terms), grads = gradients(trainable, frozen, batch)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        rate = schedule(state.step)
        moved = jax.tree.map(lambda p, u, f: p - rate * f * u, trainable, updates, factors)
        targets = jnp.sum(batch["mask"] > 0, axis=1)
        # Of finite gradients, too, an optimizer can make values that are not.
        finite_update = _all_finite(moved, opt_state)
        sound = jnp.isfinite(loss) & finite_update & jnp.any(targets > 0)
        good, guard = state.guard.watch(sound, norm, config.run.spike_factor)
        keep = lambda new, old: jnp.where(good, new, old)
        state = TrainState(
            state.step + 1,
            joined(frozen, jax.tree.map(keep, moved, trainable)),
            jax.tree.map(keep, opt_state, state.opt_state),
            guard,
        )
        metrics = {
            **terms,
            "objective": loss,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "without_target": jnp.sum(targets == 0),
            "skipped": guard.skipped,
            "consecutive_skips": guard.consecutive_skips,
            "finite_update": finite_update,
        }
        if "segment_ids" in batch:
            metrics["padding"] = jnp.mean(batch["segment_ids"] == 0)
        return state, metrics

    return step


def _without_borders(batch: Batch) -> Batch:
    """A batch in whose mask no token predicts one of another document."""
    return {**batch, "mask": target_mask(batch["mask"], batch.get("segment_ids"))}


def _all_finite(params: Params, opt_state: Any) -> jax.Array:
    """Whether every floating-point value of parameters and optimizer state is finite.

    A parameter and its moments, which lie on the same devices, share one reduction: with one for
    each array, small models would spend much of a step and of its compilation on these.
    """
    structure: Any = jax.tree.structure(params)
    alike = lambda tree: jax.tree.structure(tree) == structure
    parts = jax.tree.leaves(opt_state, is_leaf=alike)
    moments = [part for part in parts if alike(part)]
    others = [x for x in parts if not alike(x) and jnp.issubdtype(x.dtype, jnp.floating)]
    together = lambda *arrays: functools.reduce(jnp.logical_and, map(jnp.isfinite, arrays)).all()
    finite = [*jax.tree.leaves(jax.tree.map(together, params, *moments)), *map(together, others)]
    return jnp.all(jnp.stack(finite))


def _eval_step(config: Config, stage: Stage, model: RWKVX) -> Callable:
    def step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of the losses of valid targets, and their number."""
        batch = _without_borders(batch)
        bound = bind(model, params, stage)
        segment_ids = batch.get("segment_ids")
        losses = token_losses(bound, batch["tokens"], config.run.loss_block, segment_ids)
        return jnp.sum(losses.cross_entropy * batch["mask"]), jnp.sum(batch["mask"])

    return step
