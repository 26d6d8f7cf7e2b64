"""What a model may read of a chunk: its tokens, its latent, or both; and that it reads the same in training and generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core import generate
from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.generate import SpecialIds
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import LatentLossConfig, LatentObjective
from calm.core.predictor import NextVector
from calm.errors import UsageError
from calm.heads.flow import FlowHeadConfig
from calm.rng import row_keys
from jaxpr_flops import matmul_flops
from random_models import random_model

SIZES = dict(vocab_size=13, chunk_size=2, latent_dim=5)
STEMS = ("discrete", "continuous", "both")
CHUNKS = np.random.default_rng(0).integers(0, 13, (2, 6, 2)).astype(np.int32)


def config(stem: str) -> LatentLMConfig:
    backbone = BackboneConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=12)
    return LatentLMConfig(stem=stem, backbone=backbone, head=FlowHeadConfig(num_blocks=1, num_steps=2), **SIZES)


@pytest.fixture(scope="module")
def autoencoder():
    return random_model(AutoencoderConfig(dim=4, inner_dim=6, **SIZES))


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_reads_what_its_name_says_and_nothing_else(stem):
    lm = random_model(config(stem))
    latents = np.random.default_rng(1).standard_normal((2, 6, 5), np.float32)
    run = jax.jit(lambda chunks, latents: lm.stem(chunks, latents))
    before, tokens, other = run(CHUNKS, latents), (CHUNKS + 1) % 13, latents + 1
    assert before.shape == (2, 6, 8)
    assert (np.abs(run(tokens, latents) - before).max() > 1e-3) == (stem != "continuous")
    assert (np.abs(run(CHUNKS, other) - before).max() > 1e-3) == (stem != "discrete")


@pytest.mark.parametrize("stem", STEMS)
def test_the_past_does_not_see_the_future_and_generation_reads_what_training_reads(stem, autoencoder):
    lm = random_model(config(stem))
    model = NextVector(autoencoder, lm)
    whole = jax.jit(lambda chunks: lm.hidden(chunks, autoencoder=autoencoder)[0])
    before, later = whole(CHUNKS), CHUNKS.copy()
    later[:, 3:] = (later[:, 3:] + 1) % 13
    np.testing.assert_array_equal(whole(later)[:, :3], before[:, :3])
    assert np.abs(whole(later)[:, 3:] - before[:, 3:]).max() > 1e-4
    step = jax.jit(lambda chunks, state: model.hidden(chunks, state))
    state, parts = model.init_state(2, 8), []
    for block in np.split(CHUNKS, [4, 5], axis=1):
        part, state = step(block, state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), before, atol=1e-5)


@pytest.mark.parametrize("stem", ["continuous", "both"])
def test_it_trains_every_weight_and_generates(stem, autoencoder):
    objective = LatentObjective(config(stem), LatentLossConfig(energy_weight=0.0), autoencoder, context=6)
    lm = random_model(config(stem))
    params = {"lm": nnx.state(lm)}
    tokens = jnp.asarray(CHUNKS.reshape(2, -1))
    gradients = jax.jit(jax.grad(lambda p: objective.loss(p, objective.frozen, tokens, jax.random.key(0))[0]))(params)
    flat = {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(gradients["lm"])}
    assert all(np.isfinite(value).all() and np.abs(value).max() > 0 for value in flat.values())
    assert ("stem.embedding" in flat) == (stem == "both")
    special = SpecialIds(begin_id=10, end_id=11, mask_id=12)
    made = generate(NextVector(autoencoder, lm), [[1, 2, 3], []], row_keys(jax.random.key(0), 2), special=special, max_tokens=6)
    assert made.tokens.shape == (2, 6) and not np.isin(made.tokens, [10, 12]).any()


@pytest.mark.parametrize("stem", STEMS)
def test_flops_and_parameters_follow_what_is_read(stem):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config(stem).build(rngs=nnx.Rngs(0))))
    chunks, latents = jax.ShapeDtypeStruct((6, 2), jnp.int32), jax.ShapeDtypeStruct((6, 5), jnp.float32)
    made = matmul_flops(lambda p, c, z: nnx.merge(graphdef, p).stem(c, z), params, chunks, latents)
    rest = config(stem).flops(6, 1) - config("discrete").flops(6, 1)
    width = {"discrete": 16, "continuous": 5, "both": 21}[stem]
    assert made == 6 * 2 * (width * 16 + 16 * 8) and rest == 2 * (width - 16) * 16
    difference = config(stem).parameters() - config("discrete").parameters()
    assert difference == (width - 16) * 16 - (13 * 8 if stem == "continuous" else 0)


def test_latents_need_their_autoencoder():
    with pytest.raises(UsageError, match="stem 'continuous' reads latents: give its autoencoder"):
        random_model(config("continuous")).hidden(jnp.asarray(CHUNKS))
