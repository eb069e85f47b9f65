"""AdamW with named policies: which parameters decay, and which learn at another rate.

The learning rate is applied by the train step, because it follows the stage's own step count
while the moments may outlive a stage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from rwkvx_jax.config import ConfigError, OptimizerConfig, Stage

# Last parts of the names of weight matrices in the sense of RWKV-LM ("*.weight", two dimensions).
_MATRICES = {"embed", "weight", "receptance", "key", "value", "gate", "output"}


class Treatment(NamedTuple):
    """What a policy does to one parameter."""

    decay: bool
    rate: float  # factor of the learning rate


def treatment(policy: str, name: str, axes: tuple[str, ...]) -> Treatment:
    """How `policy` treats the parameter called `name` (dotted) with logical axes `axes`.

    "rwkvx" (the RWKV-X repository): decay on every tensor with two or more dimensions besides
    the layers, no special rates. "rwkv_lm" (RWKV-LM): decay on the weight matrices only, w0 at
    twice the rate.
    """
    dimensions = len([axis for axis in axes if axis != "layers"])
    if policy == "rwkvx":
        return Treatment(decay=dimensions >= 2, rate=1.0)
    if policy == "rwkv_lm":
        leaf = name.rsplit(".", 1)[-1]
        return Treatment(
            decay=dimensions >= 2 and leaf in _MATRICES, rate=2.0 if leaf == "w0" else 1.0
        )
    raise ConfigError(f"unknown optimizer policy {policy!r}: choose rwkvx or rwkv_lm")


def treatments(policy: str, axes: dict[str, Any]) -> dict[str, Any]:
    """The treatment of every parameter, in the structure of `axes` (see model.param_axes)."""

    def one(path: tuple, leaf_axes: tuple[str, ...]) -> Treatment:
        return treatment(policy, ".".join(key.key for key in path), leaf_axes)

    return jax.tree_util.tree_map_with_path(one, axes, is_leaf=lambda x: isinstance(x, tuple))


def make_optimizer(config: OptimizerConfig, plan: dict[str, Any]) -> optax.GradientTransformation:
    """Clipping, Adam and decay; the result is the step for a learning rate of -1.

    Args:
      config: constants.
      plan: `treatments` of the trainable parameters.
    """
    is_leaf = lambda x: isinstance(x, Treatment)
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
    if config.weight_decay:
        mask = jax.tree.map(lambda t: t.decay, plan, is_leaf=is_leaf)
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
    return optax.chain(*parts)


def rate_factors(plan: dict[str, Any]) -> dict[str, Any]:
    """Learning-rate factor of every parameter of a plan."""
    return jax.tree.map(lambda t: t.rate, plan, is_leaf=lambda x: isinstance(x, Treatment))


def learning_rate(stage: Stage) -> optax.Schedule:
    """Rate by step of the stage: a climb from 1 % of the peak, then the stage's schedule.

    As in RWKV-LM and RWKV-X, a warm-up over n steps multiplies the peak at step i < n by
    0.01 + 0.99 i / n, and the progress of a cosine (here of "linear" too) counts from its end.
    """
    steps = max(1, stage.steps - stage.warmup_steps)
    if stage.schedule == "constant":
        main = optax.constant_schedule(stage.peak_lr)
    elif stage.schedule == "cosine":
        main = optax.cosine_decay_schedule(stage.peak_lr, steps, stage.final_lr / stage.peak_lr)
    else:
        main = optax.linear_schedule(stage.peak_lr, stage.final_lr, steps)
    if not stage.warmup_steps:
        return main
    warmup = optax.linear_schedule(0.01 * stage.peak_lr, stage.peak_lr, stage.warmup_steps)
    return optax.join_schedules([warmup, main], [stage.warmup_steps])
