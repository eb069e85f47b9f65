"""The checkpoints kept in results/ do what results/README.md says of them."""

import pytest

from rwkvx_jax.checkpoint import load_checkpoint
from rwkvx_jax.evals.models import open_models
from rwkvx_jax.evals.tasks import niah, passkey
from rwkvx_jax.experiment_files import load_config
from tests.evals.eval_models import QUIET
from tests.helpers import ROOT

RESULTS = ROOT / "results"
HYBRID, TWIN = "recall_64k", "recall_64k_rwkv7"


def asked(kind, tmp_path, name, **flags):
    return kind(checkpoint=(RESULTS / f"{name}.safetensors",), output=tmp_path, **flags)


@pytest.mark.parametrize("name, experiment", [(HYBRID, "recall_64k"), (TWIN, "recall_64k:rwkv7")])
def test_the_models_are_those_of_their_configs(name, experiment):
    config = load_config(experiment)
    loaded = load_checkpoint(RESULTS / f"{name}.safetensors")
    assert loaded.model.config == config.model and loaded.tokenizer == "byte"
    assert loaded.step == sum(stage.steps for stage in config.stages)
    assert loaded.trained_length == 65_536


@pytest.mark.thorough
def test_the_hybrid_finds_passkeys(tmp_path):
    flags = {"lengths": (3000,), "depths": 4, "trials": 1}
    options = asked(passkey.PasskeyOptions, tmp_path, HYBRID, **flags)
    results = passkey.evaluate(options, open_models(options), QUIET)
    assert results.summary(f"{HYBRID}.safetensors")["all"]["accuracy"] == 1


@pytest.mark.thorough
def test_the_hybrid_finds_one_of_sixty_four_pairs(tmp_path):
    flags = {"tasks": ("recall_64",), "lengths": (3000,), "depths": 4, "trials": 1}
    options = asked(niah.NiahOptions, tmp_path, HYBRID, **flags)
    results = niah.evaluate(options, open_models(options), QUIET)["recall_64"]
    assert results.summary(f"{HYBRID}.safetensors")["all"]["accuracy"] >= 0.75
