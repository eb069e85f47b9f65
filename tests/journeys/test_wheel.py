"""From a checkout to a wheel, from the wheel to an empty environment, from there to a model."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import rwkvx_jax
from tests.helpers import ROOT

pytestmark = pytest.mark.thorough

CONFIG = """
from rwkvx_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(vocab_size=257, num_blocks=1, num_attention_blocks=1, width=64,
                          head_size=64, ffn_width=64, chunk_size=32, top_k=2),
        stages=(Stage("short", 64, 2, 5, 1e-3),),
        run=RunConfig(compute_dtype="float32", eval_batches=0, checkpoint_every=5),
    )
"""


def command(*words, cwd: Path, status: int = 0) -> str:
    """What a command prints, run as from a shell that knows nothing of this checkout."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env = inherited | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def distribution(tmp_path_factory) -> Path:
    """The sdist of a copy of this checkout, and the wheel that is built from it."""
    place = tmp_path_factory.mktemp("distribution")
    names = command("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in names.splitlines():
        if (ROOT / name).is_file() and not name.startswith("results/"):
            (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / "source" / name)
    command(sys.executable, "-m", "build", "--outdir", "..", ".", cwd=place / "source")
    return place


@pytest.fixture(scope="module")
def rwkvx(distribution, tmp_path_factory):
    """The command of the wheel in an environment that has its dependencies and nothing of ours."""
    place = tmp_path_factory.mktemp("elsewhere")
    command(sys.executable, "-m", "venv", "--without-pip", "env", cwd=place)
    (packages,) = (place / "env" / "lib").glob("python*/site-packages")
    # A line of a .pth file is a path whose own .pth files, such as this checkout's, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = distribution.glob("*.whl")
    python = str(place / "env" / "bin" / "python")
    install = ("install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel))
    command(sys.executable, "-m", "pip", "--python", python, *install, cwd=place)

    def run(*words: str, status: int = 0) -> str:
        return command(str(place / "env" / "bin" / "rwkvx"), *words, cwd=place, status=status)

    home = command(python, "-c", "import rwkvx_jax; print(rwkvx_jax.__file__)", cwd=place)
    assert str(packages) in home
    run.place = place
    return run


def test_the_wheel_is_whole_and_asks_for_no_test_tools(distribution):
    (wheel,) = distribution.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        about = archive.read(metadata).decode()
    shipped = {path.name for path in (ROOT / "configs").glob("*.py")}
    assert {f"rwkvx_jax/configs/{name}" for name in shipped} <= set(names)
    assert "pallas_kernels/static_costs.json" in names and "rwkvx_jax/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "configs/"))]
    needed = [line for line in about.splitlines() if line.startswith("Requires-Dist")]
    assert any("flax" in line for line in needed)
    assert not [line for line in needed if "pytest" in line and "extra" not in line]
    assert f"Version: {rwkvx_jax.__version__}\n" in about


def test_the_sdist_has_configs_documents_and_tests(distribution):
    (sdist,) = distribution.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = "train.py eval.py requirements.txt configs/tiny_cpu.py docs/training.md Makefile"
    assert set(wanted.split()) <= names and "tests/helpers.py" in names


def test_from_the_wheel_to_a_model_and_its_answers(rwkvx):
    (rwkvx.place / "small.py").write_text(CONFIG)
    assert rwkvx("--version").split() == ["rwkvx-jax", rwkvx_jax.__version__]
    rwkvx("train", "--config", "small.py", "--workdir", "run")
    printed = rwkvx("eval", "passkey", "--checkpoint", "run", "--output", "out",
                    "--lengths", "128", "--depths", "1", "--trials", "1")  # fmt: skip
    assert (rwkvx.place / "out" / "passkey.png").is_file() and "128" in printed
    assert "The" in rwkvx("generate", "--checkpoint", "run", "--prompt", "The", "--max-tokens", "4")
    rwkvx("convert", "run", "model.safetensors")
    assert (rwkvx.place / "model.safetensors").is_file()


def test_shipped_configs_are_found_by_name(rwkvx):
    printed = rwkvx("train", "--config", "rwkvx_3b6_stage2:v5p129", status=1)
    assert "no variant 'v5p129': choose from v5p128" in printed
    printed = rwkvx("train", "--config", "tiny_gpu", status=1)
    assert "tiny_cpu" in printed and "no config file tiny_gpu" in printed


def test_a_command_that_does_not_exist_gets_the_nearest(rwkvx):
    assert "did you mean train?" in rwkvx("tarin", status=2)
    assert all(name in rwkvx() for name in ("train", "eval", "generate", "convert", "doctor"))
