"""The published code's numbers, stage by stage, and files that are not what they should be.

tests/golden/published: two models of random weights in the published layout, and what the published code computes with them in
float32 on a CPU. `k4`: K=4. `k2_gqa`: K=2, two query heads share a key-value head.
"""

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from calm.core.energy_score import plain_energy_loss
from calm.core.posterior import Gaussian
from calm.errors import UsageError
from calm.interop.official import load_autoencoder, load_latent_lm, training_settings
from calm.runs.weights import flat_weights

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "published"
TOLERANCE = 1e-5  # of the largest value of each array


def stages(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(published arrays, ours under the same names)."""
    theirs = dict(np.load(folder / "reference.npz"))
    autoencoder, lm = load_autoencoder(folder / "autoencoder"), load_latent_lm(folder / "energy")
    alpha = training_settings(folder / "energy")["alpha"]
    chunk_size, positions = autoencoder.config.chunk_size, theirs["lm_noise"].shape[1]
    chunks = jnp.asarray(theirs["input_ids"].reshape(2, -1, chunk_size), jnp.int32)
    graphdef, params = nnx.split(lm)

    @jax.jit
    def everything(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        lm = nnx.merge(graphdef, params)
        posterior = autoencoder.encode(chunks)
        target = Gaussian(*(x[:, 1:].reshape(positions, -1) for x in posterior))
        hidden, _ = lm.hidden(chunks[:, :-1])
        samples = lm.head(hidden.reshape(positions, -1), jnp.asarray(theirs["lm_noise"]))
        energies = plain_energy_loss(samples, target.mean + target.std * theirs["target_eps"], alpha=alpha)
        logits = autoencoder.logits(jnp.asarray(theirs["ae_z"]))
        return (
            energies.mean(),
            {
                "ae_mean": posterior.mean,
                "ae_log_std": posterior.log_std,
                "ae_decoder_logits": logits.reshape(theirs["ae_decoder_logits"].shape),
                "target_mean": target.mean,
                "target_log_std": target.log_std,
                "lm_input_embeds": lm.stem(chunks[:, :-1]),
                "lm_hidden": hidden,
                "lm_predictions": samples,
                "energy_score": -energies,  # published as a score: higher is better
                "sampled_tokens": autoencoder.decode(samples[:2]).reshape(theirs["sampled_tokens"].shape),
            },
        )

    (loss, ours), gradients = jax.jit(jax.value_and_grad(everything, has_aux=True))(params)
    gradients = flat_weights(nnx.merge(graphdef, gradients))
    ours["loss"] = loss
    ours["grad/transformer.embed_tokens.weight"] = gradients["stem.embedding"]
    ours["grad/embed_proj.0.weight"] = gradients["stem.widen.kernel"].T
    query = gradients["backbone.blocks.layer.attention.qkv.kernel"][0][:, : lm.config.backbone.dim]
    ours["grad/transformer.layers.0.self_attn.q_proj.weight"] = query.T
    ours["grad/generative_head.mlp_blocks.0.down_proj.weight"] = gradients["head.blocks.layer.down.kernel"][0].T
    ours["grad/generative_head.final_layer.linears.2.weight"] = gradients["head.out.kernel"].T
    return theirs, ours


@pytest.mark.parametrize("name", ["k4", "k2_gqa"])
def test_every_stage_and_gradient_agrees_with_the_published_code(name):
    theirs, ours = stages(GOLDEN / name)
    errors = {}
    for key, value in ours.items():
        value, reference = np.asarray(value), theirs[key]
        assert value.shape == reference.shape, key
        if key == "sampled_tokens":
            np.testing.assert_array_equal(value, reference)
        else:
            errors[key] = float(np.abs(value - reference).max() / np.abs(reference).max())
    assert set(theirs) - set(ours) == {"input_ids", "ae_z", "lm_noise", "target_eps"} | {"brier"} & set(theirs)
    assert max(errors.values()) <= TOLERANCE, errors


def test_every_norm_has_the_published_epsilon():
    """The stem's variance is so large in the golden models that their numbers do not tell 1e-6 from 1e-5."""
    for model in (load_autoencoder(GOLDEN / "k4" / "autoencoder"), load_latent_lm(GOLDEN / "k4" / "energy")):
        norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.LayerNorm | nnx.RMSNorm)]
        assert len(norms) >= 6 and {norm.epsilon for norm in norms} == {1e-6}


def test_bin_and_safetensors_are_the_same_model(tmp_path):
    shutil.copytree(GOLDEN / "k2_gqa", tmp_path / "bin", ignore=shutil.ignore_patterns("*.safetensors"))
    for load, stage in ((load_autoencoder, "autoencoder"), (load_latent_lm, "energy")):
        one, other = flat_weights(load(GOLDEN / "k2_gqa" / stage)), flat_weights(load(tmp_path / "bin" / stage))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_the_frozen_autoencoder_inside_a_language_model_file_is_the_autoencoder():
    inside, apart = (load_autoencoder(GOLDEN / "k2_gqa" / stage) for stage in ("energy", "autoencoder"))
    assert inside.config == apart.config
    for key, value in flat_weights(apart).items():
        np.testing.assert_array_equal(flat_weights(inside)[key], value)


def test_training_settings_come_under_our_names():
    assert training_settings(GOLDEN / "k4" / "energy") == {"alpha": 1.0, "num_samples": 8}
    dropout = {"token_dropout": 0.15, "latent_dropout": 0.15}
    assert training_settings(GOLDEN / "k4" / "autoencoder") == {"kl_weight": 0.001, "kl_clamp": 0.5} | dropout


@pytest.fixture
def folder(tmp_path):
    """A published language model that a test may damage."""
    shutil.copytree(GOLDEN / "k2_gqa" / "energy", tmp_path / "energy", ignore=shutil.ignore_patterns("*.bin"))
    return tmp_path / "energy"


def edit_config(folder: pathlib.Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def edit_weights(folder: pathlib.Path, drop: str = "", **changes: np.ndarray) -> None:
    weights = load_file(folder / "model.safetensors")
    weights = {key: value for key, value in weights.items() if not (drop and key.startswith(drop))}
    save_file(weights | changes, folder / "model.safetensors")


def test_either_name_of_the_head_is_enough_and_old_rotary_buffers_are_ignored(folder):
    before = flat_weights(load_latent_lm(folder))
    edit_weights(folder, "generative_head.", **{"transformer.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})
    for key, value in flat_weights(load_latent_lm(folder)).items():
        np.testing.assert_array_equal(before[key], value)


def test_shards_are_read_through_their_index(folder):
    before, weights = flat_weights(load_latent_lm(folder)), load_file(folder / "model.safetensors")
    files = {key: f"model-{index % 2}.safetensors" for index, key in enumerate(weights)}
    for file in set(files.values()):
        save_file({key: weights[key] for key in weights if files[key] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    for key, value in flat_weights(load_latent_lm(folder)).items():
        np.testing.assert_array_equal(before[key], value)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model-0.safetensors"}}))
    with pytest.raises(UsageError, match="index.json: weight_map"):
        load_latent_lm(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: edit_weights(folder, "transformer.norm"), "weight 'transformer.norm.weight' is missing"),
        (lambda folder: edit_weights(folder, extra=np.ones(2)), "1 weights that this model does not have.*'extra'"),
        (lambda folder: edit_config(folder, hidden_size=48), r"'.*' has shape \(.*\), config.json needs \(.*\)"),
        (lambda folder: edit_config(folder, patch_size=...), "config.json: patch_size should be a number, is missing"),
        (lambda folder: edit_config(folder, patch_size="two"), "config.json: patch_size should be a number, got 'two'"),
        (lambda folder: edit_config(folder, patch_size=0), "patch_size should be a whole number of at least 1, got 0"),
        (lambda folder: edit_config(folder, hidden_act="gelu"), "config.json: hidden_act is 'gelu'; only 'silu'"),
        (lambda folder: edit_config(folder, rms_norm_eps=1e-5), "config.json: rms_norm_eps is 1e-05; only 1e-06"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: expected a JSON object"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights here; expected model.safetensors or"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"cut"), "model.safetensors: damaged or cut short"),
        (
            lambda folder: edit_weights(folder, **{"mlp_generator.norm_noise.bias": np.full(24, 7, np.float32)}),
            "'mlp_generator.norm_noise.bias' and 'generative_head.norm_noise.bias' differ",
        ),
    ],
)
def test_a_folder_that_is_not_right_is_refused_in_one_line(folder, damage, words):
    damage(folder)
    with pytest.raises(UsageError, match=words) as error:
        load_latent_lm(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_an_untied_autoencoder_is_refused(folder):
    edit_weights(folder, **{"ae_model.decoder.lm_head_weight": np.zeros((53, 16), np.float32)})
    with pytest.raises(UsageError, match="must equal encoder.embed_tokens.weight"):
        load_autoencoder(folder)
