"""An export is the model, bit for bit, and says nothing that it was not told."""

import json
import os
import stat

import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.errors import CalmError, UsageError
from calm.runs.folders import (
    ModelCard,
    export_autoencoder,
    export_latent_lm,
    load_exported_autoencoder,
    load_exported_latent_lm,
)
from calm.runs.weights import flat_weights
from random_models import random_model

SIZES = dict(vocab_size=11, chunk_size=2, latent_dim=3)


@pytest.fixture(scope="module")
def models():
    backbone = BackboneConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=1, inner_dim=12, rope_theta=500.0)
    head = EnergyHeadConfig(num_blocks=1, noise_dim=4, init_std=0.02)
    autoencoder = random_model(AutoencoderConfig(dim=4, inner_dim=6, **SIZES))
    return random_model(LatentLMConfig(backbone=backbone, head=head, **SIZES)), autoencoder


def assert_same(one, other):
    ours, theirs = flat_weights(one), flat_weights(other)
    assert one.config == other.config and ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes(), name


def test_round_trip_is_exact_and_readable_by_everyone(models, tmp_path):
    lm, autoencoder = models
    (tmp_path / "source.json").write_bytes(b'{"version": "1.0"}')
    folder = tmp_path / "deep" / "export"
    for _ in range(2):  # the second replaces the first
        export_latent_lm(lm, autoencoder, folder, tmp_path / "source.json")
    assert_same(lm, load_exported_latent_lm(folder))
    assert_same(autoencoder, load_exported_autoencoder(folder))
    assert_same(autoencoder, load_exported_autoencoder(folder / "autoencoder"))
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    model = ["config.json", "model.safetensors"]
    assert files == ["README.md", *(f"autoencoder/{name}" for name in model), *model, "tokenizer.json"]
    assert (folder / "tokenizer.json").read_bytes() == b'{"version": "1.0"}'
    assert {stat.S_IMODE((folder / file).stat().st_mode) for file in files} == {0o644}


def test_precision_is_chosen_at_loading(models, tmp_path):
    export_autoencoder(models[1], tmp_path)
    loaded = load_exported_autoencoder(tmp_path, "bfloat16")
    assert loaded.precision == loaded.encoder.squeeze.precision == "bfloat16"
    assert {str(weight.dtype) for weight in flat_weights(loaded).values()} == {"float32"}


def test_config_names_the_model(models, tmp_path):
    export_latent_lm(*models, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "calm-latent-lm" and config["library_name"] == "calm-lm"
    assert {name: config[name] for name in SIZES} == SIZES
    assert config["config"]["backbone"]["rope_theta"] == 500.0 and config["config"]["init_std"] == "none"


def test_the_card_claims_only_what_it_is_given_and_its_code_runs(models, tmp_path):
    lm, autoencoder = models
    export_latent_lm(lm, autoencoder, tmp_path)
    text = (tmp_path / "README.md").read_text()
    header, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "## Results" not in body and "license" not in header and "datasets" not in header
    assert f"{sum(weight.size for weight in flat_weights(lm).values()):,} (language model)" in body
    exec(body.split("```python\n")[1].split("```")[0], names := {"folder": tmp_path})
    assert_same(names["lm"], lm)
    results = (("BrierLM", "1.2 [1.0, 1.4]", "wikitext2 test, block 1024, S=8 | argmax"),)
    card = ModelCard(name="tiny: \u00fc", license="mit", datasets=("pydoc",), results=results, command="calm quickstart")
    export_latent_lm(lm, autoencoder, tmp_path, card=card)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert 'license: "mit"\ndatasets: ["pydoc"]' in text and "# tiny: \u00fc\n" in text and "calm quickstart" in text
    assert "| BrierLM | 1.2 [1.0, 1.4] | wikitext2 test, block 1024, S=8 / argmax |" in text


def test_an_export_that_fails_leaves_what_was_there(models, tmp_path, monkeypatch):
    lm, autoencoder = models
    export_latent_lm(lm, autoencoder, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(CalmError, match="cannot write the export .*No space left on device"):
        export_latent_lm(lm, autoencoder, tmp_path, card=ModelCard(name="another"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_does_not_belong_together_is_refused(models, tmp_path):
    lm, autoencoder = models
    other = random_model(AutoencoderConfig(dim=4, inner_dim=6, **(SIZES | {"chunk_size": 3})))
    with pytest.raises(UsageError, match="chunk_size is 2 in the language model and 3 in the autoencoder"):
        export_latent_lm(lm, other, tmp_path)
    with pytest.raises(UsageError, match="no such tokenizer file"):
        export_latent_lm(lm, autoencoder, tmp_path, tmp_path / "none.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        export_latent_lm(lm, autoencoder, tmp_path / "file")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="belongs to another model"):
        export_latent_lm(lm, autoencoder, tmp_path)
    with pytest.raises(UsageError, match="model_type should be 'calm-latent-lm', got 'llama'"):
        load_exported_latent_lm(tmp_path)


def test_damaged_exports_are_refused_in_one_line(models, tmp_path):
    export_autoencoder(models[1], tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, description = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-1])
    with pytest.raises(UsageError, match="model.safetensors: damaged or cut short"):
        load_exported_autoencoder(tmp_path)
    weights.unlink()
    with pytest.raises(UsageError, match="model.safetensors: cannot be read"):
        load_exported_autoencoder(tmp_path)
    weights.write_bytes(whole)
    for changes, words in (
        ({"dim": 5}, r"model.safetensors: weight '.*' has shape .*, the configuration needs"),
        ({"encoder_layers": 4}, r"has shape \(1, .*the configuration needs \(2,"),
        ({"widht": 5}, "config.json: unknown key 'widht'"),
        ({"dim": "wide"}, "config.json: dim: expected"),
    ):
        config.write_text(json.dumps(description | {"config": description["config"] | changes}))
        with pytest.raises(UsageError, match=words) as error:
            load_exported_autoencoder(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="config.json: cannot be read"):
        load_exported_latent_lm(tmp_path / "none")


def test_transposed_arrays_are_written_in_their_logical_order(models, tmp_path):
    """safetensors writes the memory of an array as it lies; a transposed view must be laid out first."""
    autoencoder = models[1]
    table = np.asarray(autoencoder.table)
    graphdef, state = nnx.split(autoencoder)
    state["embedding"] = state["embedding"].replace(np.asfortranarray(table))
    export_autoencoder(nnx.merge(graphdef, state), tmp_path)
    np.testing.assert_array_equal(load_exported_autoencoder(tmp_path).table, table)
