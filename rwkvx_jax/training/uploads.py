"""Text files of a run in a bucket, where nothing can be appended."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from rwkvx_jax.storage import bucket_errors, write_whole

_log = logging.getLogger(__name__)

UPLOAD_SECONDS = 60.0
_WAIT_SECONDS = 5.0  # for an upload, which a bucket that answers needs less for


class BucketLines:
    """A file that grows: all of it is written again, now and then and in `upload`.

    An upload that fails is told, and made good by the next one: it never ends a run. It is waited
    for for 5 seconds at most, so that a checkpoint is hardly ever there before what belongs to it.
    """

    def __init__(self, path: Path):
        """Begins with what is there.

        Raises:
          OSError: it can't be read.
        """
        self._path, self._failed = path, False
        self._thread: threading.Thread | None = None
        with bucket_errors(path):
            self._text = path.read_text() if path.exists() else ""
        self._begun = time.monotonic()

    def add(self, line: str) -> None:
        self._text += line
        if time.monotonic() - self._begun > UPLOAD_SECONDS:
            self.upload()

    def upload(self) -> None:
        if self._thread is not None and not self._failed:
            self._thread.join(_WAIT_SECONDS)  # it may be of an older text
        if self._thread is None or not self._thread.is_alive():
            self._begun = time.monotonic()
            self._thread = threading.Thread(target=self._put, args=(self._text,), daemon=True)
            self._thread.start()
        if not self._failed:
            self._thread.join(_WAIT_SECONDS)

    def close(self) -> None:
        if self._thread is not None and not self._failed:
            self._thread.join()
        self.upload()
        assert self._thread is not None  # begun by `upload`
        self._thread.join(_WAIT_SECONDS if self._failed else None)

    def _put(self, text: str) -> None:
        try:
            write_whole(self._path, text.encode())
            self._failed = False
        except OSError as error:
            self._failed = True
            _log.warning("not uploaded, trying again later: %s", error)
