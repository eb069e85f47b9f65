"""Files with one writer at a time, which appear whole or not at all."""

import os
import subprocess
import sys
import threading

import pytest

from rwkvx_jax.config import ConfigError
from rwkvx_jax.storage import exclusive, new_file, write_whole

_HOLD = """
import pathlib, sys, time
from rwkvx_jax.storage import exclusive
with exclusive(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """(lock file, process that holds it)."""
    lock = tmp_path / "x.lock"
    process = subprocess.Popen([sys.executable, "-c", _HOLD, lock], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield lock, process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_until_the_first_is_gone(holder):
    lock, process = holder
    with pytest.raises(ConfigError, match="another one is here"):
        with exclusive(lock, busy="another one is here"):
            pass
    process.kill()
    process.wait()
    with exclusive(lock, busy="another one is here"):
        pass


def test_a_lock_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        with exclusive(tmp_path / "file" / "x.lock"):
            pass


def test_a_new_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(RuntimeError):
        with new_file(path) as file:
            file.write(b"half")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_file(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_or_a_pipe_stays_what_it_is(tmp_path):
    """A user who may write to /dev would have replaced /dev/stdout by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    read = []
    reader.start()
    write_whole(pipe, b"text")
    reader.join(30)
    assert read == [b"text"] and pipe.is_fifo()
