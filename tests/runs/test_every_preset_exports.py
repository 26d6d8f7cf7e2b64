"""Every preset, shrunk, comes back from an export as the same model: configuration, weights and outputs."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from calm.core.predictor import NextVector
from calm.runs import presets
from calm.runs.folders import (
    export_latent_lm,
    export_token_lm,
    load_exported_autoencoder,
    load_exported_latent_lm,
    load_exported_token_lm,
)
from calm.runs.weights import build_with_weights, flat_weights
from shrunk import shrunk

ROWS, CHUNKS, DRAWS = 2, 5, 3


@functools.cache
def model(config: Any) -> Any:
    """A model with every weight drawn, scalars included."""
    generator = np.random.default_rng(0)
    _, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))
    shapes = {".".join(map(str, path)): variable.get_value().shape for path, variable in nnx.to_flat_state(state)}
    weights = {name: np.asarray(0.2 * generator.standard_normal(shape), np.float32) for name, shape in shapes.items()}
    return build_with_weights(config, weights, where="test")


@functools.cache
def program(graphdef: Any) -> Any:
    """Everything that a model computes for generation, compiled once for presets of the same shape."""

    @jax.jit
    def outputs(state: Any, chunks: jax.Array, previous: jax.Array, key: jax.Array) -> dict[str, Any]:
        predictor = nnx.merge(graphdef, state)
        hidden, _ = predictor.hidden(chunks)
        noise = predictor.draw_noise(key, (DRAWS, ROWS), predictor.decoding)
        written = predictor.write(hidden[:, -1], previous, noise, decoding=predictor.decoding)
        values = {"hidden": hidden, "written": written}
        if isinstance(predictor, NextVector):
            posterior = predictor.autoencoder.encode(chunks)
            values |= {"latents": posterior, "logits": predictor.autoencoder.logits(posterior.mean)}
        return values

    return outputs


def outputs(predictor: Any) -> Any:
    generator, (graphdef, state) = np.random.default_rng(1), nnx.split(predictor)
    chunks = generator.integers(0, predictor.vocab_size, (ROWS, CHUNKS, predictor.chunk_size), np.int32)
    previous = generator.integers(0, predictor.vocab_size, (ROWS, predictor.reach), np.int32)
    return program(graphdef)(state, chunks, previous, jax.random.key(2))


def assert_same(one: Any, other: Any) -> None:
    ours, theirs = flat_weights(one), flat_weights(other)
    assert one.config == other.config and ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].shape == theirs[name].shape and ours[name].tobytes() == theirs[name].tobytes(), name


def assert_same_outputs(one: Any, other: Any) -> None:
    ours, theirs = outputs(one), outputs(other)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.isfinite(a).all() and a.size
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_comes_back_from_its_export(name, tmp_path):
    preset = presets.get(name)
    autoencoder, lm = model(shrunk(preset.autoencoder.model)), model(shrunk(preset.lm.model))
    export_latent_lm(lm, autoencoder, tmp_path / "lm")
    loaded_lm, loaded = load_exported_latent_lm(tmp_path / "lm"), load_exported_autoencoder(tmp_path / "lm")
    assert_same(lm, loaded_lm)
    assert_same(autoencoder, loaded)
    assert_same_outputs(NextVector(autoencoder, lm), NextVector(loaded, loaded_lm))
    token_lm = model(shrunk(preset.token_lm.model))
    export_token_lm(token_lm, tmp_path / "token")
    loaded_token_lm = load_exported_token_lm(tmp_path / "token")
    assert_same(token_lm, loaded_token_lm)
    assert_same_outputs(token_lm, loaded_token_lm)


def test_the_shrunk_presets_have_scalar_weights_and_every_kind_of_layer():
    """What the test above would miss if shrinking took it away."""
    models = [shrunk(presets.get(name).lm.model) for name in presets.names()]
    assert {config.backbone.pattern for config in models} == {presets.get(n).lm.model.backbone.pattern for n in presets.names()}
    assert {type(config.head) for config in models} == {type(presets.get(n).lm.model.head) for n in presets.names()}
    shapes = {weight.shape for config in models for weight in flat_weights(model(config)).values()}
    assert () in shapes
