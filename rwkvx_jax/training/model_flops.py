"""The products that a model's mathematics asks for, counted by hand: the numerator of MFU.

Matrix products only, two flops a multiplication with addition. What an implementation adds (blocks
recomputed in the backward pass, the chunked form of the recurrence, tiles half masked) is not in
here, so that a better implementation shows as a better utilisation.
"""

from __future__ import annotations

from rwkvx_jax.config import Config, ModelConfig, Stage
from rwkvx_jax.ops.selection import selector_of
from rwkvx_jax.training.losses import longce_starts
from rwkvx_jax.training.memory import parameter_counts


def recurrence_flops(config: ModelConfig) -> float:
    """Of one token in one recurrent block: v k^T and S r, with the delta rule S a and (S a) b^T as
    well, each 2 K V a head. That of RWKV-4 has no products."""
    products = 0 if config.mixer == "rwkv4" else 4 if config.mixer_sizes.delta else 2
    return 2.0 * products * config.mixer_sizes.state


def rwkv_block_flops(config: ModelConfig) -> float:
    """Forward products of one token in one recurrent block."""
    matrices = config.mixer_sizes.matrices + config.channel_mix_matrices
    return 2.0 * matrices + recurrence_flops(config)


def visible_keys(config: ModelConfig, time: int) -> float:
    """Keys that a query attends to, on average over the queries of a sequence."""
    if config.attention == "full":
        return (time + 1) / 2
    size = config.chunk_size
    whole, rest = divmod(time, size)
    own = whole * size * (size + 1) // 2 + rest * (rest + 1) // 2
    return (own + size * _past_chunks(config, time, config.top_k - 1)) / time


def _past_chunks(config: ModelConfig, time: int, most: int) -> int:
    """Past chunks of each query, at most `most` of them, summed over the queries of a sequence."""
    whole, rest = divmod(time, config.chunk_size)
    few = min(whole, most)  # chunks with fewer than `most` before them
    chunks = few * (few - 1) // 2 + (whole - few) * most
    return chunks * config.chunk_size + rest * few


def attention_flops(config: ModelConfig, time: int) -> float:
    """Forward products of one token's attention itself: scores, weighted values and gate, the
    latter as the mean over blocks, of which some may not choose."""
    gate = 0.0
    if config.attention == "nsa":
        ended = (_past_chunks(config, time, time) + time // config.chunk_size) / time
        near = min(time, config.window_size)
        window = (near * (near + 1) // 2 + (time - near) * near) / time
        gate = 4.0 * config.width * (ended + window)  # the weights of the means are the gate
    if config.attention == "sparse":
        selector, heads = selector_of(config), (config.asking_heads, config.scored_heads)
        past = _past_chunks(config, time, time) / time
        products = selector.products(*heads) * past
        if selector.span:
            products = (
                selector.products(*heads)
                * _past_chunks(config, time, selector.span * selector.spans)
                / time
                + selector.coarse.products(*heads) * past / selector.span
            )
        gate = 2.0 * (products * config.scored_size + config.indexer_matrices)
        gate *= config.choosing_blocks / max(1, config.num_attention_blocks)
    return 4.0 * config.width * visible_keys(config, time) + gate


def attention_block_flops(config: ModelConfig, time: int) -> float:
    """Forward products of one token in one attention block of a sequence of `time` tokens."""
    matrices = config.attention_matrices + config.channel_mix_matrices
    return 2.0 * matrices + attention_flops(config, time)


def forward_flops(config: ModelConfig, time: int) -> float:
    """Forward products of one sequence of `time` tokens, logits of every token included."""
    return time * (
        config.num_blocks * rwkv_block_flops(config)
        + config.num_attention_blocks * attention_block_flops(config, time)
        + 2.0 * config.width * config.vocab_size
    )


def step_flops(config: Config, stage: Stage) -> float:
    """Products of one training step of a stage, over all devices.

    Forward once; backward twice that, of which frozen matrices need the half that goes on to their
    inputs; adapters beside them like any other matrices; LongCE's windows forward once, and logits
    of the tokens that get a weight.
    """
    model, time = config.stage_model(stage), stage.seq_len
    adapters = parameter_counts(config, stage)[1] if stage.trainable == "lora" else 0
    forward = lambda time: forward_flops(model, time) + 2.0 * time * adapters
    total = 3.0 * forward(time)
    if stage.trainable != "all":
        frozen = model.num_blocks * (rwkv_block_flops(model) - recurrence_flops(model))
        frozen += 2.0 * model.width * model.vocab_size
        if stage.trainable != "attention":
            own = attention_block_flops(model, time) - attention_flops(model, time)
            frozen += model.num_attention_blocks * own
        total -= time * frozen
    if stage.selection_loss:
        total += 2.0 * model.choosing_blocks * model.width * time * (time + 1) / 2
    if stage.loss == "longce":
        span = stage.longce.window + stage.longce.stride
        windows = len(longce_starts(time, stage.longce))
        logits = 2.0 * model.width * model.vocab_size
        total += windows * (forward(span) - stage.longce.window * logits)
    return stage.global_batch * total


def prefill_flops(config: ModelConfig, batch: int, piece: int, before: int) -> float:
    """Products of reading `piece` tokens after `before` others, in each of `batch` texts."""
    whole, start = forward_flops(config, before + piece), forward_flops(config, before)
    head = 2.0 * config.width * config.vocab_size
    return batch * (whole - (start if before else 0.0) - (piece - 1) * head)
