"""Brings a checkpoint to this machine's disk, wherever it is: a disk, a bucket, the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rwkvx_jax.convert.files import INDEX
from rwkvx_jax.convert.hub import fetch
from rwkvx_jax.convert.tensors import ConversionError
from rwkvx_jax.storage import in_hub, local_copy


@contextmanager
def on_disk(path: Path) -> Iterator[Path]:
    """The checkpoint's own path, or that of a copy of a remote one, for as long as it is read.

    A copy from a bucket goes when the block ends; one from the Hub stays in the Hub's cache.

    Args:
      path: as `storage.work_path` makes it.

    Raises:
      ConversionError: it can't be copied.
    """
    if in_hub(path):
        yield fetch(path)
        return
    sharded = path.name.endswith(INDEX)
    with ExitStack() as held:
        try:
            copy = held.enter_context(local_copy(path.parent if sharded else path))
        except OSError as error:
            raise ConversionError(f"{path} can't be read: {error}") from error
        yield copy / path.name if sharded else copy
