"""What training minimises: terms, regularisers, and that devices do not change it."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.cross_entropy import plain_cross_entropy
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import AutoencoderLossConfig, AutoencoderObjective, LatentLossConfig, LatentObjective
from calm.errors import UsageError
from calm.rng import stream

SMALL = AutoencoderConfig(vocab_size=24, chunk_size=2, latent_dim=6, dim=8, inner_dim=12)
LM = LatentLMConfig(
    vocab_size=24,
    chunk_size=2,
    latent_dim=6,
    backbone=BackboneConfig(dim=16, num_layers=2, num_heads=2, num_kv_heads=1, inner_dim=24),
    head=EnergyHeadConfig(num_blocks=1, noise_dim=4),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 24, (4, 16)), jnp.int32)
MASK = 2


def latent_objective(**terms: object) -> LatentObjective:
    return LatentObjective(LM, LatentLossConfig(num_samples=3, **terms), SMALL.build(rngs=nnx.Rngs(1)), context=8)


def test_without_regularisers_the_autoencoder_loss_is_its_definition():
    off = AutoencoderLossConfig(token_dropout=0.0, latent_dropout=0.0, random_chunks=0.0, kl_weight=0.01, kl_clamp=0.3)
    objective = AutoencoderObjective(SMALL, off, mask_id=MASK)
    params = objective.init(jax.random.key(0))
    loss, terms = jax.jit(objective.loss)(params, {}, TOKENS, jax.random.key(5))
    autoencoder, chunks = objective.module(params), TOKENS.reshape(-1, 2)
    posterior = autoencoder.encode(chunks)
    states = autoencoder.decode_states(posterior.sample(stream(jax.random.key(5), "posterior")))
    nats = plain_cross_entropy(states.reshape(-1, 8), autoencoder.table, chunks.reshape(-1)).reshape(-1, 2).sum(-1)
    expected = (nats + 0.01 * jnp.maximum(posterior.kl(), 0.3).sum(-1)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(terms["cross_entropy"] * 2, nats.mean(), rtol=1e-5)


def test_token_dropout_writes_the_mask_id_and_spares_the_targets(monkeypatch: pytest.MonkeyPatch):
    objective = AutoencoderObjective(SMALL, AutoencoderLossConfig(token_dropout=0.5, random_chunks=0.0), mask_id=MASK)
    seen = []
    encode = type(objective.module(objective.init(jax.random.key(0)))).encode
    monkeypatch.setattr(
        "calm.autoencoder.Autoencoder.encode", lambda self, chunks: (seen.append(chunks), encode(self, chunks))[1]
    )
    objective.loss(objective.init(jax.random.key(0)), {}, TOKENS, jax.random.key(1))
    fed, original = np.asarray(seen[0]), np.asarray(TOKENS.reshape(-1, 2))
    share = (fed == MASK).mean()
    assert 0.2 < share < 0.8 and MASK not in original
    np.testing.assert_array_equal(fed[fed != MASK], original[fed != MASK])


def test_random_chunks_are_whole_chunks(monkeypatch: pytest.MonkeyPatch):
    objective = AutoencoderObjective(SMALL, AutoencoderLossConfig(token_dropout=0.0, random_chunks=0.5), mask_id=MASK)
    seen = []
    encode = type(objective.module(objective.init(jax.random.key(0)))).encode
    monkeypatch.setattr(
        "calm.autoencoder.Autoencoder.encode", lambda self, chunks: (seen.append(chunks), encode(self, chunks))[1]
    )
    tokens = jnp.full((4, 512), 7, jnp.int32)
    objective.loss(objective.init(jax.random.key(0)), {}, tokens, jax.random.key(1))
    replaced = (np.asarray(seen[0]) != 7).any(-1).mean()
    assert 0.4 < replaced < 0.6


def test_the_auxiliary_term_is_trained_beside_the_model_and_fades():
    with_term = latent_objective(auxiliary_weight=2.0, auxiliary_decay_steps=10)
    params = with_term.init(jax.random.key(0))
    assert set(params) == {"lm", "auxiliary"} and set(latent_objective().init(jax.random.key(0))) == {"lm"}
    loss = jax.jit(with_term.loss)
    key = jax.random.key(3)
    at = [loss(params, with_term.frozen, TOKENS, key, step) for step in (0, 5, 10, 99)]
    term = float(at[0][1]["auxiliary"])
    for (total, terms), weight in zip(at, (2.0, 1.0, 0.0, 0.0), strict=True):
        np.testing.assert_allclose(total, terms["energy"] + weight * term, rtol=1e-5)
    # the language model's own weights do not depend on whether the term is on
    jax.tree.map(np.testing.assert_array_equal, params["lm"], latent_objective().init(jax.random.key(0))["lm"])


def test_the_auxiliary_term_teaches_the_backbone_and_not_the_autoencoder():
    objective = latent_objective(auxiliary_weight=1.0, energy_from_step=10)
    params = objective.init(jax.random.key(0))
    both = jax.jit(jax.grad(lambda *p: objective.loss(*p, TOKENS, jax.random.key(0))[0], argnums=(0, 1)))
    gradients, frozen = both(params, objective.frozen)
    assert float(jnp.abs(gradients["lm"]["stem"]["embedding"][...]).max()) > 0
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(frozen))
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradients["lm"]["head"]))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match="vocab_size=25 of the LM does not match the autoencoder's 24"):
        import dataclasses

        LatentObjective(dataclasses.replace(LM, vocab_size=25), LatentLossConfig(), SMALL.build(rngs=nnx.Rngs(0)), context=8)
    with pytest.raises(UsageError, match="K=2 must divide the block of 15 tokens"):
        AutoencoderObjective(SMALL, AutoencoderLossConfig(), mask_id=MASK).loss(
            AutoencoderObjective(SMALL, AutoencoderLossConfig(), mask_id=MASK).init(jax.random.key(0)),
            {},
            TOKENS[:, :15],
            jax.random.key(0),
        )


@pytest.mark.parametrize(
    "bad",
    [
        dict(num_samples=1),
        dict(alpha=2.0),
        dict(alpha=0.0),
        dict(num_draws=0),
        dict(auxiliary_weight=-1.0),
    ],
)
def test_bad_terms_are_refused(bad: dict):
    with pytest.raises(UsageError, match=next(iter(bad)).split("_")[0]):
        LatentLossConfig(**bad)


@pytest.mark.parametrize("name", ["token_dropout", "latent_dropout", "random_chunks"])
def test_shares_lie_below_one(name: str):
    with pytest.raises(UsageError, match=name):
        AutoencoderLossConfig(**{name: 1.0})


FOUR_DEVICES = """
import jax, numpy as np
from test_objective import TOKENS, latent_objective
from calm.train.mesh import MeshConfig
from calm.train.optim import OptimizerConfig
from calm.train.steps import StepConfig, TrainStep

def losses(layout):
    mesh = layout.build()
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
    config = StepConfig(total_steps=20, batch_size=4, num_tokens=16, optimizer=optimizer)
    with jax.set_mesh(mesh):
        step = TrainStep(latent_objective(auxiliary_weight=1.0), config, mesh, layout)
        leaves, found = step.init(jax.random.key(0)), []
        for _ in range(20):
            leaves = step(leaves, np.asarray(TOKENS))
            found.append(float(step.state(leaves).sums["loss"]))
    cut = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(step.state(leaves).params))
    return found, cut

assert jax.device_count() == 4
one, none = losses(MeshConfig(data=1))
four, some = losses(MeshConfig(data=2, model=2, minimum_size=0))
assert none == 0 and some > 10, (none, some)
np.testing.assert_allclose(four, one, rtol=1e-5)
assert one[-1] < one[0]
"""


def test_one_and_four_devices_agree_over_twenty_float32_steps():
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FOUR_DEVICES)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
