"""An in-memory file system that stands for gs:// buckets."""

import pytest


@pytest.fixture
def bucket(monkeypatch):
    """What `etils.epath` finds under gs://, as an empty fsspec file system."""
    fsspec = pytest.importorskip("fsspec")
    from etils.epath import backend

    class Bucket(fsspec.get_filesystem_class("memory")):
        protocol = "gs"
        store = {}
        pseudo_dirs = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.removeprefix("gs://"))

        def glob(self, path, **options):
            return [name.lstrip("/") for name in super().glob(path, **options)]

        def info(self, path, **options):
            return super().info(path, **options) | {"mtime": 0.0}

    bucket = Bucket()
    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda *_: bucket)
    return bucket
