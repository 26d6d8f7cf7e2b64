"""Runs, exports and files of configuration schema 1 stay readable and mean the same. `tests/golden/schema_1` was written by
the last version that wrote them: `lm` is a run folder, `outputs.npz` what its model computes, `configs` resolved presets."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import calm
from calm import config
from calm.errors import UsageError
from calm.runs import presets, schema
from calm.runs.stages import RunConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "schema_1"
CONFIGS = sorted(GOLDEN.glob("configs/*.toml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_old_files_are_read_as_the_presets_that_wrote_them(file):
    name, part = file.stem.rsplit(".", 1)
    run = config.from_dict(RunConfig, config.read_toml(file), where=str(file))
    assert run == getattr(presets.get(name), part)


def test_a_run_folder_of_schema_1_computes_what_it_did():
    model = calm.load(GOLDEN / "lm")
    known = np.load(GOLDEN / "outputs.npz")
    tokens = jnp.asarray(known["tokens"])
    hidden, _ = model.predictor.hidden(tokens)
    np.testing.assert_allclose(hidden, known["hidden"], atol=1e-5)
    noise = model.lm.head.draw_noise(jax.random.key(0), (2, *hidden.shape[:-1]))
    np.testing.assert_allclose(model.lm.head(hidden, noise), known["latents"], atol=1e-5)
    np.testing.assert_allclose(model.autoencoder.encode(tokens).mean, known["posterior_mean"], atol=1e-5)


def test_a_file_without_a_version_is_of_today():
    with pytest.raises(UsageError, match="unknown key 'loss.energy_weight'"):
        config.from_dict(RunConfig, {"kind": "latent_lm", "loss": {"energy_weight": 0.5}}, where="file.toml")


def test_parts_of_old_files_are_read_too():
    run = config.from_dict(
        RunConfig, {"schema_version": 1, "kind": "latent_lm", "loss": {"auxiliary_weight": 2.0, "alpha": 1.2}}
    )
    assert {name: term.weight for name, term in run.loss.terms.items()} == {"energy": 1.0, "auxiliary": 2.0}
    assert run.loss.terms["energy"].alpha == 1.2


@pytest.mark.parametrize(
    ("flat", "head", "weights"),
    [
        ({}, "energy", {"energy": 1.0}),
        ({}, "FlowHeadConfig", {"energy": 1.0, "own": 1.0}),
        ({"energy_weight": 0.0}, "MixtureHeadConfig", {"own": 1.0}),
        ({}, "GatedEnergyHeadConfig", {"energy": 1.0, "direction": 0.0}),
        ({"energy_weight": 0.0, "direction_weight": 1.0}, "energy", {"energy": 0.0, "direction": 1.0}),
        ({"likelihood_weight": 1.0, "energy_weight": 0.1}, "energy", {"energy": 0.1, "likelihood": 1.0}),
    ],
)
def test_terms_are_trained_or_measured_as_they_were(flat, head, weights):
    assert {name: term["weight"] for name, term in schema.latent_loss(flat, head)["terms"].items()} == weights
