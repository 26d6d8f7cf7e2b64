"""An export is the model, bit for bit, and says nothing that it was not told."""

import json
import os
import stat

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import calm
from calm.core.autoencoder import AutoencoderConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.transformer import TransformerConfig
from calm.errors import CalmError, UsageError
from calm.runs import folders, whole_folder
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
    backbone = TransformerConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=1, inner_dim=12, rope_theta=500.0)
    head = EnergyHeadConfig(num_blocks=1, noise_dim=4, init_std=0.02)
    autoencoder = random_model(AutoencoderConfig(dim=4, inner_dim=6, **SIZES))
    return random_model(LatentLMConfig(backbone=backbone, head=head, **SIZES)), autoencoder


def assert_same(one, other):
    ours, theirs = flat_weights(one), flat_weights(other)
    assert one.config == other.config and ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and ours[name].tobytes() == theirs[name].tobytes(), name


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def test_the_card_claims_only_what_it_is_given(models, tmp_path):
    lm, autoencoder = models
    export_latent_lm(lm, autoencoder, tmp_path)
    text = (tmp_path / "README.md").read_text()
    header, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "## Results" not in body and "license" not in header and "datasets" not in header
    assert f"{sum(weight.size for weight in flat_weights(lm).values()):,} (language model)" in body
    results = (("BrierLM", "1.2 [1.0, 1.4]", "wikitext2 test, block 1024, S=8 | argmax"),)
    card = ModelCard(name="tiny: \u00fc", license="mit", datasets=("pydoc",), results=results, command="calm quickstart")
    export_latent_lm(lm, autoencoder, tmp_path, card=card)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert 'license: "mit"\ndatasets: ["pydoc"]' in text and "# tiny: \u00fc\n" in text and "calm quickstart" in text
    assert "| BrierLM | 1.2 [1.0, 1.4] | wikitext2 test, block 1024, S=8 / argmax |" in text


def test_the_snippet_of_a_card_runs_as_it_stands(tiny_runs, tmp_path, capsys):
    calm.load(tiny_runs / "lm").export(tmp_path / "export")
    snippet = (tmp_path / "export" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet, {"folder": tmp_path / "export"})
    assert capsys.readouterr().out.strip()


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


def test_large_weights_go_to_shards_with_an_index(models, tmp_path):
    lm, autoencoder = models
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    limit = 1000
    export_latent_lm(lm, autoencoder, whole)
    export_latent_lm(lm, autoencoder, sharded, max_shard_bytes=limit)
    assert_same(lm, load_exported_latent_lm(sharded))
    assert_same(autoencoder, load_exported_autoencoder(sharded))
    index, weights = json.loads((sharded / "model.safetensors.index.json").read_text()), flat_weights(lm)
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in weights.values())
    shards = {file: load_file(sharded / file) for file in files}
    assert {name: file for file in files for name in shards[file]} == index["weight_map"]
    assert all(len(shard) == 1 or sum(array.nbytes for array in shard.values()) <= limit for shard in shards.values())
    assert not (sharded / "model.safetensors").exists() and (sharded / "autoencoder" / "model.safetensors.index.json").exists()
    export_latent_lm(lm, autoencoder, sharded)  # the shards of the export before do not stay
    assert contents(sharded) == contents(whole)
    with pytest.raises(UsageError, match="max_shard_bytes must be at least 1, got 0"):
        export_autoencoder(autoencoder, tmp_path / "none", max_shard_bytes=0)


def test_a_shard_that_is_missing_or_wrong_is_named(models, tmp_path):
    export_autoencoder(models[1], tmp_path, max_shard_bytes=1)
    first = next(iter(tmp_path.glob("model-00001-of-*.safetensors")))
    save_file({"other": np.ones(1, np.float32)}, first)
    with pytest.raises(UsageError, match="model.safetensors.index.json: weight .* is not in model-00001"):
        load_exported_autoencoder(tmp_path)
    first.unlink()
    with pytest.raises(UsageError, match="model-00001-of-.*: cannot be read"):
        load_exported_autoencoder(tmp_path)


@pytest.mark.parametrize("limit", [500, 4_000_000_000])
def test_equal_weights_give_equal_bytes(models, tmp_path, limit):
    first = tmp_path / "first"
    export_latent_lm(*models, first, max_shard_bytes=limit)
    for number in range(6):
        export_latent_lm(*models, tmp_path / str(number), max_shard_bytes=limit)
        assert contents(tmp_path / str(number)) == contents(first)


def test_what_an_export_before_had_more_does_not_stay_and_files_of_others_do(models, tmp_path):
    lm, autoencoder = models
    export_latent_lm(lm, autoencoder, tmp_path, tokenizer=lambda path: path.write_text("{}"))
    for name in ("notes.txt", "autoencoder/notes.txt"):
        (tmp_path / name).write_text(name)
    export_autoencoder(autoencoder, tmp_path)
    assert contents(tmp_path).keys() == {"config.json", "model.safetensors", "notes.txt", "autoencoder/notes.txt"}
    assert_same(autoencoder, load_exported_autoencoder(tmp_path))


@pytest.mark.parametrize("moment", ["model.safetensors", "autoencoder/model.safetensors", "config.json", "tokenizer.json"])
def test_killed_while_writing_any_file_an_export_is_the_old_one(models, tmp_path, moment, monkeypatch):
    """Both models at once: never a new autoencoder beside an old language model."""
    lm, autoencoder = models
    other = random_model(autoencoder.config, seed=5), random_model(lm.config, seed=6)
    folder = tmp_path / "out"
    export_latent_lm(lm, autoencoder, folder, tokenizer=lambda path: path.write_text("old"))
    before = contents(folder)
    replace = whole_folder.replace_files

    def until(folder, files, **rest):
        def stop(path):
            raise KeyboardInterrupt

        replace(folder, {**files, moment: stop}, **rest)

    monkeypatch.setattr(folders, "replace_files", until)
    with pytest.raises(KeyboardInterrupt):
        export_latent_lm(other[1], other[0], folder, tokenizer=lambda path: path.write_text("new"))
    assert contents(folder) == before and [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(folders, "replace_files", replace)
    export_latent_lm(other[1], other[0], folder, tokenizer=lambda path: path.write_text("new"))
    assert_same(other[0], load_exported_autoencoder(folder))
    assert_same(other[1], load_exported_latent_lm(folder))
    assert (folder / "tokenizer.json").read_text() == "new"
