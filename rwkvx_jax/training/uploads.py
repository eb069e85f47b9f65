"""Text files of a run in a bucket, where nothing can be appended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rwkvx_jax.records import RecordFile, as_text
from rwkvx_jax.storage import bucket_errors, write_whole

_log = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0
_WAIT_SECONDS = 5.0  # for an upload, which a bucket that answers needs less for


class BucketLines(RecordFile):
    """A file that grows: all of it is written again, now and then and in `upload`.

    An upload that fails is told, and made good by the next one: it never ends a run. It is waited
    for for 5 seconds at most, so that a checkpoint is hardly ever there before what belongs to it.
    """

    def __init__(self, path: Path):
        """Begins with what is there.

        Raises:
          OSError: it can't be read.
        """
        super().__init__(path)
        self._failed = False
        self._thread: threading.Thread | None = None
        with bucket_errors(path):
            self._text = path.read_text() if path.exists() else ""
        self._begun = time.monotonic()

    def append(self, values: Sequence[Any]) -> None:
        self._text += "".join(f"{as_text(value)}\n" for value in values)
        if time.monotonic() - self._begun > UPLOAD_SECONDS:
            self.upload()

    def upload(self, *, last: bool = False) -> None:
        """Writes what was appended; `last`: waits for it, if the bucket answered before."""
        if not last:
            self._upload()
            return
        if self._thread is not None and not self._failed:
            self._thread.join()
        self._upload().join(_WAIT_SECONDS if self._failed else None)

    def _upload(self) -> threading.Thread:
        thread = self._thread
        if thread is not None and not self._failed:
            thread.join(_WAIT_SECONDS)  # it may be of an older text
        if thread is None or not thread.is_alive():
            self._begun = time.monotonic()
            self._thread = thread = threading.Thread(
                target=self._put, args=(self._text,), daemon=True
            )
            thread.start()
        if not self._failed:
            thread.join(_WAIT_SECONDS)
        return thread

    def _put(self, text: str) -> None:
        try:
            write_whole(self.path, text.encode())
            self._failed = False
        except OSError as error:
            self._failed = True
            _log.warning("not uploaded, trying again later: %s", error)
