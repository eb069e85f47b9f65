"""Small token files and conversations, shared by the tests of the data room."""

import numpy as np

from rwkvx_jax.data.binidx import write_index


def documents(stream):
    return [
        stream.read(int(start), int(size))
        for start, size in zip(stream.starts, stream.sizes, strict=True)
    ]


def write_binidx(prefix, documents, dtype=np.uint16):
    prefix.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    with prefix.with_suffix(".idx").open("wb") as file:
        write_index(file, np.asarray([len(d) for d in documents]), np.dtype(dtype))
