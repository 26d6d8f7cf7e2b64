"""Tokens of the last chunk given to the head directly: what is added, in every mode of running, and nothing when it is off."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.transformer import TransformerConfig
from calm.errors import UsageError
from calm.runs.weights import build_with_weights, flat_weights
from jaxpr_flops import matmul_flops
from random_models import random_model

OFF = LatentLMConfig(
    vocab_size=13,
    chunk_size=2,
    latent_dim=5,
    backbone=TransformerConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=1, inner_dim=12),
    head=EnergyHeadConfig(num_blocks=1, noise_dim=4),
)
ON = dataclasses.replace(OFF, head_reads_chunk=True)
CHUNKS = np.random.default_rng(0).integers(0, 13, (2, 6, 2)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return random_model(ON)


def test_off_the_model_is_as_it_was_and_on_it_has_a_norm_and_a_kernel_more():
    off, on = (flat_weights(config.build(rngs=nnx.Rngs(0))) for config in (OFF, ON))
    assert set(on) - set(off) == {"direct.norm.scale", "direct.out.kernel"} and set(off) <= set(on)
    assert all(on[name].tobytes() == off[name].tobytes() for name in off)  # the same draws: it is built last
    assert on["direct.out.kernel"].shape == (2 * 8, 8)


def test_it_adds_a_linear_map_of_the_last_chunk_s_normalised_embeddings(model):
    weights = {name: value for name, value in flat_weights(model).items() if not name.startswith("direct")}
    without, chunks = build_with_weights(OFF, weights, where="test"), jnp.asarray(CHUNKS)
    added = np.asarray(model.hidden(chunks)[0] - without.hidden(chunks)[0])
    rows = np.asarray(model.stem.embedding[...])[CHUNKS].reshape(2, 6, 16)
    rows = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(model.direct.norm.scale[...])
    np.testing.assert_allclose(added, rows @ np.asarray(model.direct.out.kernel[...]), atol=1e-5)
    np.testing.assert_allclose(model.read_directly(chunks), added, atol=1e-5)
    np.testing.assert_array_equal(without.read_directly(chunks), np.zeros((2, 6, 8)))


def test_a_chunk_reaches_its_own_position_directly_and_no_earlier_one(model):
    run = jax.jit(lambda chunks: (model.hidden(chunks)[0], model.read_directly(chunks)))
    (hidden, direct), later = run(CHUNKS), CHUNKS.copy()
    later[:, 3, 1] = (later[:, 3, 1] + 1) % 13
    after, direct_after = run(later)
    np.testing.assert_array_equal(after[:, :3], hidden[:, :3])
    assert (np.abs(after - hidden).max(-1) > 1e-4)[:, 3:].all()
    moved = np.abs(direct_after - direct).max(-1) > 1e-4
    np.testing.assert_array_equal(moved, np.broadcast_to(np.arange(6) == 3, (2, 6)))


def test_steps_and_forks_read_it_as_the_whole_sequence_does(model):
    whole = jax.jit(lambda chunks: model.hidden(chunks)[0])
    step = jax.jit(lambda chunks, state: model.hidden(chunks, state))
    state, parts = model.init_state(2, 8, rewindable=True), []
    for block in np.split(CHUNKS, [4, 5], axis=1):
        part, state = step(block, state)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole(CHUNKS), atol=1e-5)
    one = CHUNKS[:1]
    _, state = step(one, model.init_state(1, 8, rewindable=True))
    ends, branches = np.array([2, 5]), np.random.default_rng(1).integers(0, 13, (2, 3, 2)).astype(np.int32)
    forked = model.fork(state, jnp.asarray(ends), 3, 8)
    found, _ = step(branches.reshape(1, 6, 2), forked)
    for place, end in enumerate(ends):
        for branch in range(3):
            alone = np.concatenate([one[:, :end], branches[place, branch][None, None]], axis=1)
            np.testing.assert_allclose(found[0, 3 * place + branch], whole(alone)[0, -1], atol=1e-5)


def test_flops_count_it():
    graphdef, params = nnx.split(nnx.eval_shape(lambda: ON.build(rngs=nnx.Rngs(0))))
    chunks = jax.ShapeDtypeStruct((1, 6, 2), jnp.int32)
    made = matmul_flops(lambda params, chunks: nnx.merge(graphdef, params).hidden(chunks)[0], params, chunks)
    assert made == 6 * (ON.flops(6, 3) - ON.head.flops(8, 5, 3))
    assert ON.training_flops(6, 0) == ON.backbone.training_flops(6) + 3 * (made // 6 - ON.backbone.flops(6))  # no head
    assert ON.flops(6, 3) - OFF.flops(6, 3) == 2 * 16 * 8 == (ON.training_flops(6, 3) - OFF.training_flops(6, 3)) // 3


def test_a_stem_without_tokens_is_refused():
    with pytest.raises(UsageError, match="head_reads_chunk needs a stem that embeds tokens, got stem='continuous'"):
        dataclasses.replace(ON, stem="continuous")
