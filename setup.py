"""What pyproject.toml cannot say: the place of the shipped configs, and who needs pytest."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
LINES = (HERE / "requirements.txt").read_text().splitlines()

setup(
    # Configs stand at the top of a checkout, and inside the package of an installation.
    packages=[*find_packages(include=["rwkvx_jax*", "pallas_kernels*"]), "rwkvx_jax.configs"],
    package_dir={"rwkvx_jax.configs": "configs"},
    install_requires=[line for line in LINES if line[:1] not in "#" and line[:6] != "pytest"],
)
