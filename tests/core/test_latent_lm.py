"""The next-vector model end to end: laws that hold from chunks to hidden states, sizes as published, a fresh model's state."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.errors import UsageError
from jaxpr_flops import matmul_flops
from random_models import random_model

CONFIG = LatentLMConfig(
    vocab_size=13,
    chunk_size=2,
    latent_dim=5,
    backbone=BackboneConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=1, inner_dim=12),
    head=EnergyHeadConfig(num_blocks=1, noise_dim=4),
)
CHUNKS = np.random.default_rng(0).integers(0, 13, (2, 6, 2)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def test_later_chunks_do_not_change_earlier_hidden_states_and_earlier_ones_do_change_later(model):
    run = jax.jit(lambda chunks: model.hidden(chunks)[0])
    before, later, first = run(CHUNKS), CHUNKS.copy(), CHUNKS.copy()
    later[:, 3:] = (later[:, 3:] + 1) % 13
    np.testing.assert_array_equal(run(later)[:, :3], before[:, :3])
    first[:, 0, 1] = (first[:, 0, 1] + 1) % 13
    assert (np.abs(run(first) - before).max(-1) > 1e-4).all()


def test_generation_continues_a_left_padded_batch_as_each_row_alone(model):
    whole = jax.jit(lambda chunks: model.hidden(chunks)[0])
    step = jax.jit(lambda chunks, state: model.hidden(chunks, state))
    padded = CHUNKS.copy()
    padded[1, :2] = 7
    state, parts = model.init_state(2, 8, jnp.asarray([0, 2], jnp.int32)), []
    for block in np.split(padded, [4, 5], axis=1):
        part, state = step(block, state)
        parts.append(part)
    together = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(together[0], whole(CHUNKS)[0], atol=1e-5)
    np.testing.assert_allclose(together[1, 2:], whole(CHUNKS[1:, 2:])[0], atol=1e-5)


@pytest.mark.parametrize(("dim", "inner_dim", "millions"), [(1024, 2752, 371), (1536, 4096, 735), (2560, 6880, 1820)])
def test_published_sizes(dim, inner_dim, millions):
    """CALM table 1: M, L and XL, without the autoencoder."""
    config = LatentLMConfig(
        vocab_size=128_257,
        chunk_size=4,
        latent_dim=128,
        backbone=BackboneConfig(dim=dim, num_layers=16, num_heads=16, num_kv_heads=16, inner_dim=inner_dim),
        head=EnergyHeadConfig(num_blocks=4, noise_dim=64),
    )
    assert config.parameters() == pytest.approx(millions * 1e6, rel=0.03)


def test_flops_are_those_of_the_products_in_the_program():
    positions, samples = 6, 3
    graphdef, params = nnx.split(nnx.eval_shape(lambda: CONFIG.build(rngs=nnx.Rngs(0))))

    def forward(params, chunks, noise):
        model = nnx.merge(graphdef, params)
        return model.head(model.hidden(chunks)[0], noise)

    chunks = jax.ShapeDtypeStruct((1, positions, 2), jnp.int32)
    noise = jax.ShapeDtypeStruct((samples, 1, positions, 4), jnp.float32)
    assert matmul_flops(forward, params, chunks, noise) == positions * CONFIG.flops(positions, samples)


@pytest.mark.parametrize("name", ["vocab_size", "chunk_size", "latent_dim"])
def test_sizes_that_come_from_the_autoencoder_are_needed_to_build(name):
    with pytest.raises(UsageError, match="vocab_size, chunk_size and latent_dim must be set"):
        dataclasses.replace(CONFIG, **{name: 0}).build(rngs=nnx.Rngs(0))


SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from calm.autoencoder import AutoencoderConfig
from calm.heads import EnergyHeadConfig
from calm.losses import energy_loss
from calm.models import LatentLMConfig
from calm.nn import BackboneConfig

sizes = dict(vocab_size=13, chunk_size=2, latent_dim=5)
backbone = BackboneConfig(dim=8, num_layers=2, num_heads=2, num_kv_heads=1, inner_dim=12)
configs = AutoencoderConfig(dim=4, inner_dim=6, **sizes), LatentLMConfig(backbone=backbone, head=EnergyHeadConfig(), **sizes)
graphdefs = [nnx.graphdef(nnx.eval_shape(lambda c=c: c.build(rngs=nnx.Rngs(0)))) for c in configs]
generator = np.random.default_rng(0)
shapes = [nnx.state(nnx.eval_shape(lambda c=c: c.build(rngs=nnx.Rngs(0)))) for c in configs]
params = jax.tree.map(lambda x: generator.standard_normal(x.shape, np.float32), shapes)
chunks = jnp.zeros((1, 3, 2), jnp.int32)

def loss(params):
    autoencoder, lm = (nnx.merge(g, p) for g, p in zip(graphdefs, params))
    hidden, _ = lm.hidden(chunks[:, :-1])
    samples = lm.sample(jax.random.key(1), hidden, 2)
    return energy_loss(samples, autoencoder.encode(chunks[:, 1:]), jax.random.key(2)).mean()

value, gradient = jax.jit(jax.value_and_grad(loss))(params)
assert np.isfinite(value) and min(np.abs(g).max() for g in jax.tree.leaves(gradient[1])) > 0
print("fine")
"""


def test_models_work_without_the_graph_features_of_nnx():
    environment = os.environ | {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"}
    result = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=200)
    assert result.stdout == "fine\n", result.stderr
