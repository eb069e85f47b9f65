"""A prefix on disk: read once by one engine, begun from by others in later runs.

A safetensors file with the tokens, the state after them and the pages that they fill. Hashes of all
arrays are checked when they are read; the model (configuration and every parameter), the compute
dtype and the cache policy have to be those that made them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rwkvx_jax.cache import Cache, CachePolicy
from rwkvx_jax.config import ConfigError, ModelConfig, to_dict
from rwkvx_jax.convert.safetensors_file import open_safetensors, write_safetensors
from rwkvx_jax.convert.tensors import ConversionError
from rwkvx_jax.digest import flat
from rwkvx_jax.generate.programs import Held
from rwkvx_jax.model import RWKVX
from rwkvx_jax.modules.trees import Params
from rwkvx_jax.ops.selection import selector_of
from rwkvx_jax.snapshots import snapshot

_FORMAT, _VERSION = "rwkvx_jax_prefix", "1"
_REMEDY = "read the prefix again (Engine.hold) and save it anew"

Identity = dict[str, Any]
"""What a prefix depends on beside its tokens, as JSON."""


def identity_of(model: RWKVX, params: Params, policy: CachePolicy | None) -> Identity:
    """What decides the state behind a text.

    Args:
      model: as the engine has it.
      params: its parameters, stacked by layer or not.
      policy: compression of the cache.
    """
    digest = hashlib.sha256()
    for name, leaf, layer in sorted(_layers(params), key=lambda part: part[0]):
        array = np.ascontiguousarray(leaf if layer is None else leaf[layer])  # one at a time
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    return {
        "model": to_dict(model.config),
        "parameters": digest.hexdigest(),
        "compute_dtype": str(model.dtype),
        "policy": None if policy is None else asdict(policy),
    }


def _layers(params: Params) -> Iterator[tuple[str, Any, int | None]]:
    """(dotted name, array, index in it or None) of all parameters, those of each layer alone."""
    for name, leaf in flat(params):
        stack, _, rest = name.partition(".")
        if stack in ("blocks", "attention_blocks") and not rest[0].isdigit():
            yield from ((f"{stack}.{i}.{rest}", leaf, i) for i in range(len(leaf)))
        else:
            yield name, leaf, None


def write_prefix(
    path: Path, tokens: np.ndarray, held: Held, config: ModelConfig, own: Identity
) -> None:
    """Writes a prefix; the file appears only when it is complete.

    Args:
      path: destination.
      tokens: int32 [T].
      held: the state after them, with keys and values.
      config: the model.
      own: see `identity_of`.

    Raises:
      ConfigError: it can't be written.
    """
    length = int(held.state.length[0])
    cuts = _cuts(config, length)
    arrays = {"tokens": tokens} | {
        name: np.array(x[:, :, :, : cuts[name]] if name in cuts else x) for name, x in flat(held)
    }
    for name in ("state.rows.0", "state.rows.1"):  # what other texts have left behind it
        arrays[name][:, :, :, length // config.chunk_size :, length % config.chunk_size :] = 0
    try:
        write_safetensors(path, arrays, {_FORMAT: _VERSION, "identity": json.dumps(own)})
    except ConversionError as error:
        raise ConfigError(str(error)) from error


def _cuts(config: ModelConfig, rows: int) -> dict[str, int]:
    """How much of each array that grows with the cache so many rows of it fill, along axis 3."""
    selector, count = selector_of(config), -(-rows // config.chunk_size)
    spans = 2 * -(-count // selector.span) if selector.span else 0
    return {
        "state.rows.0": count,
        "state.rows.1": count,
        "state.key_sums": count * selector.rows,
        "state.span_rows": spans,
        "state.value_sums": count,
    }


def read_prefix(path: Path, empty: Cache, own: Identity) -> tuple[np.ndarray, Held]:
    """A prefix as it was written.

    Args:
      path: of the file.
      empty: a cache of one row, as the engine's.
      own: what the prefix has to depend on.

    Returns:
      Its tokens, and the state after them, with keys and values.

    Raises:
      ConfigError: another format, model or policy, a damaged file, or a prefix that the cache is
        too short for.
    """
    try:
        tensors, metadata = open_safetensors(path)
        if metadata.get(_FORMAT) != _VERSION:
            found = metadata.get(_FORMAT, "none")
            raise ConfigError(
                f"{path} has prefix format {found:.20}, and this version reads {_VERSION}: "
                f"{_REMEDY}"
            )
        _check_identity(path, json.loads(metadata["identity"]), own)
        arrays = {name: tensor.read() for name, tensor in tensors.items()}
        tokens = arrays.pop("tokens")
    except ConfigError:
        raise
    except (ConversionError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path}: no prefix can be read from it ({error}): {_REMEDY}") from error
    rows = empty.pages.keys, empty.pages.values
    state = snapshot(empty)._replace(rows=rows)
    whole = Held(state, jnp.zeros((1, own["model"]["vocab_size"]), jnp.float32))
    wanted = flat(whole)
    if {name for name, _ in wanted} != arrays.keys():
        raise ConfigError(f"{path} lacks arrays of a prefix, or has others: {_REMEDY}")
    filled = [_filled(path, name, np.asarray(x), arrays[name]) for name, x in wanted]
    return tokens, jax.tree.unflatten(jax.tree.structure(whole), filled)


def _filled(path: Path, name: str, empty: np.ndarray, saved: np.ndarray) -> np.ndarray:
    """The saved array, as long as that of the cache."""
    same = saved.dtype == empty.dtype and saved.ndim == empty.ndim
    sizes = [i for i in range(saved.ndim) if not same or saved.shape[i] != empty.shape[i]]
    if sizes == [3] and saved.shape[3] > empty.shape[3]:
        raise ConfigError(
            f"{path}: {name} of the prefix has {saved.shape[3]} rows, and the cache "
            f"{empty.shape[3]}: make the engine with a larger max_length"
        )
    if sizes not in ([], [3]):
        raise ConfigError(
            f"{path}: {name} is {saved.dtype} {saved.shape}, not {empty.dtype} {empty.shape}: "
            f"{_REMEDY}"
        )
    whole = empty.copy()
    whole[tuple(slice(size) for size in saved.shape)] = saved
    return whole


def _check_identity(path: Path, saved: Identity, own: Identity) -> None:
    """Raises ConfigError naming what differs."""
    flatten = lambda x: {k: v for k, v in x.items() if k != "model"} | x["model"]
    before, now = flatten(saved), flatten(json.loads(json.dumps(own)))
    for name in sorted(before.keys() | now.keys(), key=lambda name: name == "parameters"):
        old, new = before.get(name), now.get(name)
        if old != new:
            raise ConfigError(
                f"{path} was saved with {name} {old!r:.40}, and this engine has {new!r:.40}: use "
                f"the model that made it, or {_REMEDY}"
            )
