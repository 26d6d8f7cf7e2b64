"""The decoder inside the chunk: it sees the past only, and what it writes has the probabilities that it is trained with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.decoder import ScoringTable
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector, sample_chunks
from calm.decoders.context_decoder import ContextDecoder, ContextDecoderConfig, recent_tokens
from calm.errors import UsageError
from calm.text.chunking import NOTHING
from jaxpr_flops import matmul_flops
from random_models import random_model

V, K, D, Z, W = 5, 3, 8, 4, 5
CONFIG = ContextDecoderConfig(dim=12, inner_dim=16, num_layers=2, table_dim=6, window=W)
RECALL = dataclasses.replace(CONFIG, window=2, recall=4)
REACH = {CONFIG: [NOTHING, 3, 1, 4, 0], RECALL: [NOTHING, 3, 1, 4, 0, 1]}
"""a decoder and the tokens before a chunk that it is given"""


def build(config: ContextDecoderConfig = CONFIG, vocab_size: int = V, seed: int = 0) -> ContextDecoder:
    return config.build(vocab_size, K, D, Z, rngs=nnx.Rngs(seed))


def chunk_probabilities(writer: ContextDecoder, hidden, latent, previous) -> np.ndarray:
    """p(chunk) of all V^K chunks, by teacher forcing."""
    every = jnp.stack(jnp.meshgrid(*[jnp.arange(V)] * K, indexing="ij"), -1).reshape(-1, K)
    rows = len(every)
    plan = writer.plan(jnp.broadcast_to(hidden, (rows, D)), jnp.broadcast_to(latent, (1, rows, Z)))
    states = writer.teacher_forced(plan, jnp.broadcast_to(previous, (rows, len(previous))), every)[0]
    log_probability = jax.nn.log_softmax(states @ writer.table.T)
    return np.exp(np.take_along_axis(np.asarray(log_probability), np.asarray(every)[..., None], -1).sum((1, 2)))


@pytest.mark.parametrize("config", REACH, ids=["window", "recall"])
def test_written_chunks_have_the_probabilities_of_teacher_forcing(config):
    writer, random = build(config), np.random.default_rng(0)
    hidden, latent = (jnp.asarray(random.normal(size=size), jnp.float32) for size in (D, Z))
    previous = jnp.asarray(REACH[config])
    law = chunk_probabilities(writer, hidden, latent, previous)
    assert law.sum() == pytest.approx(1, abs=1e-5)
    draws = 40_000
    plan = writer.plan(hidden, jnp.broadcast_to(latent, (draws, Z)))
    chunks = np.asarray(writer.write(plan, previous, jax.random.uniform(jax.random.key(1), (draws, K, 2))))
    found = np.bincount(chunks @ (V ** np.arange(K)[::-1]), minlength=V**K)
    expected = draws * law
    kept = expected > 5
    chi_square = ((found - expected) ** 2 / expected)[kept].sum()
    assert chi_square < kept.sum() + 4 * np.sqrt(2 * kept.sum())


@pytest.mark.parametrize("config", REACH, ids=["window", "recall"])
def test_a_token_changes_the_places_after_it_and_no_other(config):
    writer = build(config)
    plan = jnp.ones((1, 2, 12))
    previous, chunks = jnp.asarray([REACH[config], REACH[config][::-1]]), jnp.asarray([[1, 2, 3], [1, 2, 3]])
    before = writer.teacher_forced(plan, previous, chunks)
    for place in range(K):
        after = writer.teacher_forced(plan, previous, chunks.at[:, place].set(4))
        changed = np.abs(np.asarray(after - before)).max((0, 1, 3)) > 1e-6
        np.testing.assert_array_equal(changed, np.arange(K) > place)


def test_banned_tokens_are_not_written_and_greedy_writing_is_the_most_probable_path():
    writer = build()
    plan = jnp.asarray(np.random.default_rng(2).normal(size=(64, 1, 12)), jnp.float32)
    previous = jnp.asarray([[4, 3, 0, 1, 2]])
    table = ScoringTable.of(writer.table, "float32", jnp.asarray([0, 3]))
    uniforms = jax.random.uniform(jax.random.key(0), (64, 1, K, 2))
    assert set(np.unique(writer.write(plan, previous, uniforms, table))) == {0, 3}
    greedy = writer.write(plan, previous, None)
    states = writer.teacher_forced(plan, jnp.broadcast_to(previous, (1, W)), greedy[0])  # of the first sample
    np.testing.assert_array_equal((states[0] @ writer.table.T).argmax(-1), greedy[0])


@pytest.mark.parametrize("recall", [1, 4, 30])
def test_a_whole_text_is_what_its_chunks_are_one_by_one(recall):
    """Values and gradients: of every chunk behind its own memory, and of all of them with each likeness worked out once."""
    writer = build(dataclasses.replace(CONFIG, window=2, recall=recall), vocab_size=20)
    graphdef, params = nnx.split(writer)
    chunks = jnp.asarray(np.random.default_rng(3).integers(0, 4, (2, 6, K)))
    plan = jax.random.normal(jax.random.key(0), (2, 2, 5, 12))
    weights = jax.random.normal(jax.random.key(1), (2, 2, 5, K, 6))

    def at_once(params):
        return nnx.merge(graphdef, params).over_text(plan, chunks)

    def one_by_one(params):
        writer = nnx.merge(graphdef, params)
        return writer.teacher_forced(plan, recent_tokens(chunks[:, :-1], writer.config.reach), chunks[:, 1:])

    np.testing.assert_allclose(at_once(params), one_by_one(params), atol=1e-5)
    slopes = [jax.grad(lambda params, way=way: (way(params) * weights).sum())(params) for way in (at_once, one_by_one)]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-4), *slopes)
    assert np.abs(slopes[0]["recall"]["match"][...]).min() > 1e-6


def test_the_token_that_followed_is_recalled_and_nothing_where_nothing_is_alike():
    writer = build(dataclasses.replace(CONFIG, window=2, recall=6, table_dim=64), vocab_size=20)
    writer.recall.match[...] = jnp.array([40.0, 20.0])
    writer.recall.nothing[...] = jnp.float32(45.0)
    memory = writer.recall.remember(writer.table, jnp.asarray([NOTHING, 9, 7, 8, 5, 7, 3, 6]))
    seven = {(8, 5): 7, (9, 7): 8, (5, 7): 3}  # what stood behind these two
    for window, followed in seven.items():
        found = writer.recall.read_behind(memory, writer.table, jnp.asarray(window))
        np.testing.assert_allclose(found, writer.table[followed], atol=0.02)
    np.testing.assert_allclose(writer.recall.read_behind(memory, writer.table, jnp.asarray([1, 2])), 0, atol=0.02)


@pytest.mark.parametrize("use_latent", [True, False])
def test_the_predictor_writes_by_the_context_decoder(use_latent):
    """Its chunks depend on the chunk before and, if it reads latents, on the head's noise."""
    codec = AutoencoderConfig(vocab_size=40, chunk_size=K, latent_dim=Z, dim=8, inner_dim=12)
    config = LatentLMConfig(
        vocab_size=40,
        chunk_size=K,
        latent_dim=Z,
        backbone=BackboneConfig(dim=D, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=12),
        head=EnergyHeadConfig(num_blocks=1, noise_dim=3),
        context_decoder=dataclasses.replace(CONFIG, use_latent=use_latent),
    )
    lm = config.build(rngs=nnx.Rngs(0))
    lm.head.out.kernel[...] = jax.random.normal(jax.random.key(8), lm.head.out.kernel.shape)  # a new head is silent
    model = NextVector(random_model(codec), lm)
    assert model.table.shape == (40, 6) and model.reach == W
    hidden = jax.random.normal(jax.random.key(1), (7, D))
    one, other = jnp.zeros((7, W), jnp.int32), jnp.full((7, W), 3)
    first, second = (sample_chunks(model, jax.random.key(2), hidden, chunk, 5, decoding="drawn") for chunk in (one, other))
    assert first.shape == (5, 7, K) and (first != second).any()
    noise = model.draw_noise(jax.random.key(3), (5, 7), "drawn")
    greedy = [model.write(hidden, one, given) for given in (noise, noise._replace(uniforms=None))]
    np.testing.assert_array_equal(*greedy)  # the most probable tokens, whatever noise there is
    moved = noise._replace(latent=noise.latent + 1.0)
    changed = (model.write(hidden, one, noise, decoding="drawn") != model.write(hidden, one, moved, decoding="drawn")).any()
    assert changed == use_latent


@pytest.mark.parametrize(("use_latent", "use_hidden"), [(True, True), (True, False), (False, True)])
def test_flops_are_those_of_the_products_in_the_program(use_latent, use_hidden):
    config = dataclasses.replace(CONFIG, use_latent=use_latent, use_hidden=use_hidden)
    graphdef, params = nnx.split(build(config))
    samples = 3 if use_latent else 1

    def forward(params, hidden, latents, previous, chunks):
        writer = nnx.merge(graphdef, params)
        return writer.teacher_forced(writer.plan(hidden, latents), previous, chunks) @ writer.table.T

    chunks = jnp.zeros((7, K), jnp.int32)
    previous = jnp.zeros((7, W), jnp.int32)
    counted = matmul_flops(forward, params, jnp.zeros((7, D)), jnp.zeros((samples, 7, Z)), previous, chunks)
    assert counted == 7 * config.flops(D, Z, K, V, samples)


def test_flops_of_what_is_recalled_are_counted():
    config = dataclasses.replace(RECALL, recall=60, table_dim=32)
    graphdef, params = nnx.split(build(config))

    def forward(params, plan, chunks):
        writer = nnx.merge(graphdef, params)
        return writer.over_text(plan, chunks) @ writer.table.T

    counted = matmul_flops(forward, params, jnp.zeros((1, 2, 19, 12)), jnp.zeros((2, 20, K), jnp.int32))
    plan = dataclasses.replace(config, use_hidden=False).flops(D, Z, K, V, 1) - 2 * Z * 12  # without what makes the plan
    assert counted == pytest.approx(2 * 19 * plan, rel=0.03)  # the first chunk's likenesses are of no use, but are made


def test_without_the_hidden_state_only_the_latent_tells_it_of_the_past():
    writer = build(dataclasses.replace(CONFIG, use_hidden=False))
    latent, hidden = jnp.ones((1, 2, Z)), jnp.ones((2, D))
    np.testing.assert_array_equal(writer.plan(hidden, latent), writer.plan(-hidden, latent))
    assert (writer.plan(hidden, latent) != writer.plan(hidden, -latent)).any()
    with pytest.raises(UsageError, match="must read the latent"):
        ContextDecoderConfig(use_hidden=False, use_latent=False)


@pytest.mark.parametrize("reach", [0, 1, 2, 5, 9])
def test_recent_tokens_end_with_their_chunk(reach):
    chunks = np.arange(24).reshape(2, 4, 3)
    found = np.asarray(recent_tokens(jnp.asarray(chunks), reach))
    assert found.shape == (2, 4, reach)
    for row, place in np.ndindex(2, 4):
        before = [NOTHING] * reach + list(chunks[row, : place + 1].reshape(-1))
        assert list(found[row, place]) == before[len(before) - reach :]


def test_sizes_below_one_are_refused():
    with pytest.raises(UsageError, match="table_dim and window must be at least 1"):
        ContextDecoderConfig(table_dim=0)
    with pytest.raises(UsageError, match="recall must not be negative, got -1"):
        ContextDecoderConfig(recall=-1)
