"""Implementation and machine: how and on which devices to compute what a model defines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rwkvx_jax.config.values import Checked, require, require_positive

Recurrence = Literal["pallas", "chunked", "associative", "sequential"]
SparseAttention = Literal["pallas", "mosaic_gpu", "full", "xla", "masked", "reference"]


@dataclass(frozen=True)
class RunConfig(Checked):
    """How to compute and what to report; nothing here changes what is learned but by rounding."""

    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of activations and matrix products; parameters and states stay float32."""
    remat: Literal["none", "block", "save_projections", "offload"] = "block"
    """What the backward pass keeps of a block and what it computes again. "block": its input, so
    that all is computed again; "save_projections": results of large matrix products and of kernels
    too; "none": everything."""
    recurrence: Recurrence | None = None
    """Implementation of the recurrence; None lets the op choose."""
    sparse_attention: SparseAttention | None = None
    """Implementation of sparse attention; None lets the op choose."""
    loss_block: int = 4096
    """Tokens whose logits exist at once while the loss is computed."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between held-out losses; 0: at the end of each stage only."""
    eval_batches: int = 4
    """Batches of one held-out loss; 0 turns it off."""
    probe_trials: int = 0
    """Passkey prompts of the probe beside each held-out loss; 0 turns it off."""
    eval_tasks: tuple[str, ...] = ()
    """Evaluations beside each held-out loss: a task of eval.py and its flags each, such as
    "passkey --lengths 4096 --depths 5 --trials 2"; all on the training mesh. See docs/training.md.
    """
    checkpoint_every: int = 100
    """Steps between checkpoints; the end of a stage and `eval_tasks` always make one."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the last one of each stage is kept besides."""
    storage_patience: float = 600.0
    """Seconds for which training goes on while no checkpoint can be written, trying again and
    again; 0: the first failure ends it."""
    data_workers: int = 0
    """Processes that prepare batches; 0 prepares them in threads of this process."""
    bad_step: Literal["stop", "skip"] = "stop"
    """A step whose loss, gradient or update is not finite, whose gradient is a spike, or which has
    no target: stop, or skip its update and count it."""
    spike_factor: float = 0.0
    """A gradient norm above this multiple of its running mean is a spike; 0 turns that off."""
    max_skipped: int = 10
    """Skipped steps in a row after which "skip" stops as well."""
    step_timeout: float | None = None
    """Seconds in which no step (nor held-out loss, nor checkpoint) is finished, after which the
    process prints all stacks and ends, for a supervisor to start it again; compiling a step does
    not count. 0: never; None: never on one host, 1800 on several."""
    profile_steps: str = ""
    """"10:13" writes a trace of steps 10 to 12 for TensorBoard."""
    xla_flags: str = "none"
    """Flags of the TPU compiler: "none", "auto" (those of the chip's generation in
    rwkvx_jax/xla_flags.py), or flags such as "--name=value --name=value"."""
    compilation_cache: str = ""
    """Directory of compiled programs that later runs use again; empty: none."""

    def __post_init__(self):
        super().__post_init__()
        require_positive(
            "run",
            loss_block=self.loss_block,
            log_every=self.log_every,
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
        )
        for name in (
            "eval_every",
            "eval_batches",
            "probe_trials",
            "data_workers",
            "max_skipped",
            "spike_factor",
            "storage_patience",
        ):
            value = getattr(self, name)
            require(value >= 0, f"run.{name} is {value}: it must not be negative")
        require(
            self.step_timeout is None or self.step_timeout >= 0,
            f"run.step_timeout is {self.step_timeout}: use a number of seconds, or 0 for never",
        )
        require(
            self.spike_factor == 0 or self.spike_factor > 1,
            f"run.spike_factor is {self.spike_factor}: ordinary steps would count as spikes; use a "
            "factor such as 10, or 0 for none",
        )
        self.profile_range()

    def profile_range(self) -> tuple[int, int] | None:
        """First step of the trace and the step after its last, or None."""
        if not self.profile_steps:
            return None
        first, colon, last = self.profile_steps.partition(":")
        valid = bool(colon) and first.isdecimal() and last.isdecimal() and int(first) < int(last)
        require(valid, f'run.profile_steps is "{self.profile_steps}": write FIRST:LAST, as 10:13')
        return int(first), int(last)


@dataclass(frozen=True)
class MeshConfig(Checked):
    """Devices along each mesh axis; one of them may be -1: whatever is left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1
    slice_axis: Literal["data", "fsdp"] = "data"
    """Axis along which several TPU slices lie: what it sends crosses the slow network between."""
    platform: Literal["any", "cpu", "gpu", "tpu"] = "any"
    """Kind of device that must be there; "any" takes what JAX finds."""

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor", "context")}

    def __post_init__(self):
        super().__post_init__()
        sizes = self.sizes
        for name, size in sizes.items():
            require(size == -1 or size >= 1, f"mesh.{name} is {size}: use -1 or at least 1")
        fill = [name for name, size in sizes.items() if size == -1]
        require(len(fill) <= 1, f"mesh axes {fill} are all -1: only one can be filled in")
