"""Made-up checkpoints for the conversion tests, written down name by name.

The names and shapes repeat the official layouts independently of the table in
`rwkvx_jax.convert.layout`, so that a slip in that table shows.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict

from rwkvx_jax import checkpoint
from rwkvx_jax.config import to_dict
from rwkvx_jax.convert.safetensors_file import write_safetensors
from rwkvx_jax.training.loop import CONFIG_FILE

BF16 = np.dtype(ml_dtypes.bfloat16)
L, M, W, D, H, K, F = 3, 1, 11, 32, 2, 16, 48
RANKS = {"w": 5, "a": 6, "v": 7, "g": 9}


def official_shapes(
    *, attention_blocks=M, prefix="rwkv.", first_value_residual=False, width=D, heads=H, ffn=F,
    ranks=RANKS, blocks=L, vocab=W,
):  # fmt: skip
    """Names and shapes of an official checkpoint, in the file's order."""
    norm = {"weight": (width,), "bias": (width,)}
    vector, square = (1, 1, width), (width, width)
    shapes = {"emb.weight": (vocab, width)}
    for i in range(blocks):
        names = ["ln0", "ln1", "ln2"] if i == 0 else ["ln1", "ln2"]
        block = {f"{n}.{p}": s for n in names for p, s in norm.items()}
        for x in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g"):
            block[f"att.{x}"] = vector
        for pair, rank in ranks.items():
            if pair == "v" and i == 0 and not first_value_residual:
                continue
            if pair != "g":
                block[f"att.{pair}0"] = vector
            block[f"att.{pair}1"] = (width, rank)
            block[f"att.{pair}2"] = (rank, width)
        block |= {"att.k_k": vector, "att.k_a": vector}
        block["att.r_k"] = (heads, width // heads)
        for p in ("receptance", "key", "value", "output"):
            block[f"att.{p}.weight"] = square
        block |= {f"att.ln_x.{p}": s for p, s in norm.items()}
        block["ffn.x_k"] = vector
        block["ffn.key.weight"] = (ffn, width)
        block["ffn.value.weight"] = (width, ffn)
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    shapes |= {"ln_out.weight": (width,), "ln_out.bias": (width,), "head.weight": (vocab, width)}
    shapes = {prefix + name: shape for name, shape in shapes.items()}
    for j in range(attention_blocks):
        block = {f"{n}.{p}": s for n in ("ln1", "ln2") for p, s in norm.items()}
        for p in ("receptance", "key", "value", "output"):
            block[f"att.{p}.weight"] = square
        block["ffn.x_k"] = vector
        block["ffn.key.weight"] = (ffn, width)
        block["ffn.value.weight"] = (width, ffn)
        shapes |= {f"moba.{j}.{name}": shape for name, shape in block.items()}
    return shapes


def random_tensors(shapes, dtype=np.float32, seed=0):
    """Random values under the given names and shapes."""
    rng = np.random.default_rng(seed)
    return {n: rng.normal(size=s).astype(np.float32).astype(dtype) for n, s in shapes.items()}


def official_tensors(dtype=np.float32, seed=0, **layout):
    """A random official checkpoint; see `official_shapes`."""
    return random_tensors(official_shapes(**layout), dtype, seed)


def fla_tensors(official, *, fused=False, wrapped=False):
    """flash-linear-attention's form of an official RWKV-7 checkpoint (names without prefix).

    Args:
      official: tensors by official name.
      fused: one `x_x` [6, D] in each layer, as in early files.
      wrapped: vectors k_k, k_a as [1, 1, D], as in the earliest files.
    """
    modules = {
        "ln0": "pre_norm",
        "ln1": "attn_norm",
        "ln2": "ffn_norm",
        "att": "attn",
        "ffn": "ffn",
    }
    projections = {
        "receptance.weight": "r_proj.weight",
        "key.weight": "k_proj.weight",
        "value.weight": "v_proj.weight",
        "output.weight": "o_proj.weight",
        "ln_x.weight": "g_norm.weight",
        "ln_x.bias": "g_norm.bias",
    }
    low_rank = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}
    outer = {
        "emb.weight": "model.embeddings.weight",
        "ln_out.weight": "model.norm.weight",
        "ln_out.bias": "model.norm.bias",
        "head.weight": "lm_head.weight",
    }
    result = {}
    for name, tensor in official.items():
        if name in outer:
            result[outer[name]] = tensor
            continue
        _, layer, module, inner = name.split(".", 3)
        if module == "att" and inner in projections:
            inner = projections[inner]
        elif module == "att" and inner[0] in "wavg" and inner[1:] in low_rank:
            tensor = tensor.reshape(-1) if inner[1] == "0" else tensor.T
            inner = f"{inner[0]}_lora.lora.{low_rank[inner[1]]}"
        elif inner in ("k_k", "k_a") and not wrapped or module == "ffn" and inner == "x_k":
            tensor = tensor.reshape(-1)
        result[f"model.layers.{layer}.{modules[module]}.{inner}"] = tensor
    if fused:
        layers = {name.split(".")[2] for name in result if name.startswith("model.layers.")}
        for layer in layers:
            prefix = f"model.layers.{layer}.attn.x_"
            six = [result.pop(prefix + letter).reshape(-1) for letter in "rwkvag"]
            result[prefix + "x"] = np.stack(six)
    return result


def assert_identical(actual, expected):
    """Same names, shapes, dtypes and bytes."""
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].tobytes() == tensor.tobytes(), name


def read_all(tensors):
    """Every lazy tensor read."""
    return {name: tensor.read() for name, tensor in tensors.items()}


def edit(tensors, changes):
    """A copy with tensors replaced, or removed where the change is None."""
    return {n: t for n, t in (tensors | changes).items() if t is not None}


TINY_CONFIG = {
    "model_type": "rwkv7",
    "hidden_size": 128,
    "num_hidden_layers": L,
    "vocab_size": W,
    "head_dim": 64,
    "hidden_ratio": 4.0,
    "intermediate_size": None,
    "norm_eps": 1e-5,
    "norm_first": True,
    "hidden_act": "sqrelu",
    "attn": None,
    "value_dim": [128] * L,
}


def fla_directory(folder, tensors, options=TINY_CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(options))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def rwkv7(**layout):
    """A random RWKV-7 with heads of 64, as flash-linear-attention's epsilon demands."""
    shape = {"width": 128, "heads": 2, "ffn": 512, "attention_blocks": 0, "prefix": ""}
    return official_tensors(**shape, **layout)


def save_run(workdir, config, params):
    """The work directory of a run with a checkpoint after each of its steps, one a stage.

    Args:
      workdir: to be made.
      config: of the experiment, with stages of one step.
      params: by dotted name; the checkpoint of step n holds n times these.
    """
    tree = unflatten_dict({n: jnp.asarray(p) for n, p in params.items()}, sep=".")
    steps = range(1, len(config.stages) + 1)
    with checkpoint.Checkpoints(workdir, keep=len(steps)) as checkpoints:
        for step in steps:
            progress = checkpoint.progress_record(config, step - 1, 1, {})
            saved = jax.tree.map(partial(jnp.multiply, step), tree)
            checkpoints.save(step, saved, {"count": jnp.zeros(())}, progress)
        checkpoints.wait()
    (workdir / CONFIG_FILE).write_text(json.dumps(to_dict(config)))  # as train.py does
    return workdir
