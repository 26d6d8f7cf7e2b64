"""The terms of stage 2 beside the energy: each is its definition, costs what it says, and trains what it should."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import LatentLossConfig, LatentObjective, log_mean_nats, slot_energy
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.errors import UsageError
from random_models import normal, random_model

V, K, Z = 24, 2, 6
CODEC = AutoencoderConfig(vocab_size=V, chunk_size=K, latent_dim=Z, dim=8, inner_dim=12)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, V, (4, 16)), jnp.int32)


def objective(writer: ContextDecoderConfig | None = None, **terms: object) -> LatentObjective:
    lm = LatentLMConfig(
        vocab_size=V,
        chunk_size=K,
        latent_dim=Z,
        backbone=BackboneConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=24),
        head=EnergyHeadConfig(num_blocks=1, noise_dim=4),
        context_decoder=writer,
    )
    return LatentObjective(lm, LatentLossConfig(num_samples=4, **terms), random_model(CODEC), context=8)


def test_the_log_mean_likelihood_and_its_gradients_are_the_plain_formula():
    states, table = jnp.asarray(normal(3, 5, K, 8)), jnp.asarray(normal(V, 8, seed=1))
    targets = jnp.asarray(np.random.default_rng(2).integers(0, V, (5, K)))
    weights = jnp.asarray([0.1, 0.2, 0.0, 0.4, 0.3])

    def plain(states, table):
        log_probability = jax.nn.log_softmax(states @ table.T)
        chosen = jnp.take_along_axis(log_probability, jnp.broadcast_to(targets, (3, 5, K))[..., None], -1)[..., 0].sum(-1)
        return -((jax.nn.logsumexp(chosen, axis=0) - jnp.log(3.0)) * weights).sum() / K

    def ours(states, table):
        return log_mean_nats(states, table, targets, "float32", weights, table_gradient=True)

    (value, gradients), (expected, expected_gradients) = (
        jax.value_and_grad(f, argnums=(0, 1))(states, table) for f in (ours, plain)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_the_slot_energy_is_the_energy_score_of_every_slot():
    autoencoder = random_model(CODEC)
    samples, target = jnp.asarray(normal(4, 5, Z)), jnp.asarray(normal(5, Z, seed=1))
    states, truth = (np.asarray(autoencoder.decode_states(x), np.float64) for x in (samples, target))
    total = 0.0
    for slot in range(K):
        x, y = states[:, :, slot], truth[:, slot]
        fidelity = np.linalg.norm(x - y, axis=-1).mean(0)
        pairs = [np.linalg.norm(x[i] - x[j], axis=-1) for i, j in itertools.combinations(range(4), 2)]
        total += (2 * fidelity - np.mean(pairs, axis=0)).mean()
    np.testing.assert_allclose(slot_energy(autoencoder, samples, target, 1.0).mean(), total, rtol=1e-5)


WRITER = ContextDecoderConfig(dim=12, inner_dim=16, num_layers=1, table_dim=6)
PLANLESS = ContextDecoderConfig(dim=12, inner_dim=16, num_layers=1, table_dim=6, use_latent=False)
CASES = {
    "energy": (None, {}, {"lm.head", "lm.backbone", "lm.stem"}),
    "anchor": (None, dict(anchor_weight=1.0), {"anchor", "lm.head", "lm.backbone", "lm.stem"}),
    "slots": (None, dict(energy_weight=0.0, slot_energy_weight=1.0), {"lm.head", "lm.backbone", "lm.stem"}),
    "likelihood": (None, dict(energy_weight=0.0, likelihood_weight=1.0), {"lm.head", "lm.backbone", "lm.stem"}),
    "writer": (
        WRITER,
        dict(energy_weight=0.0, likelihood_weight=1.0),
        {"lm.head", "lm.backbone", "lm.stem", "lm.context_decoder"},
    ),
    "planless writer": (
        PLANLESS,
        dict(energy_weight=0.0, likelihood_weight=1.0),
        {"lm.backbone", "lm.stem", "lm.context_decoder"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_term_trains_what_it_should_and_steps_along_its_gradient_lower_it(case):
    writer, terms, trained = CASES[case]
    subject = objective(writer, **terms)
    params = subject.init(jax.random.key(0))
    head = params["lm"]["head"]["out"]["kernel"]
    head[...] = jax.random.normal(jax.random.key(8), head[...].shape)  # a new head's last map is 0: no gradient above it
    loss = jax.jit(lambda params: subject.loss(params, subject.frozen, TOKENS, jax.random.key(1))[0])
    gradients = jax.jit(jax.grad(loss))(params)
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        names = [str(getattr(entry, "key", entry)) for entry in path]
        if np.abs(leaf).max() > 0:
            found.add(names[0] if names[0] != "lm" else ".".join(names[:2]))
    assert found == trained
    before = loss(params)
    for _ in range(5):
        params = jax.tree.map(lambda x, g: x - 1e-3 * g, params, jax.jit(jax.grad(loss))(params))
    assert loss(params) < before


def test_the_energy_term_waits_for_its_step():
    subject = objective(auxiliary_weight=1.0, energy_from_step=10)
    params = subject.init(jax.random.key(0))
    run = jax.jit(lambda step: subject.loss(params, subject.frozen, TOKENS, jax.random.key(1), step))
    (early, terms), (late, _) = run(9), run(10)
    np.testing.assert_allclose(early, terms["auxiliary"], rtol=1e-6)
    np.testing.assert_allclose(late, terms["auxiliary"] + terms["energy"], rtol=1e-6)


def test_a_term_adds_its_flops():
    base = objective(auxiliary_weight=1.0).flops_per_token()
    for terms in (dict(anchor_weight=1.0), dict(slot_energy_weight=1.0), dict(likelihood_weight=1.0)):
        assert objective(auxiliary_weight=1.0, **terms).flops_per_token() > base
    cheap = objective(PLANLESS, energy_weight=0.0, likelihood_weight=1.0)
    # without a term that aims at a latent, nothing is encoded
    target = CODEC.encoder_flops() / K
    aimed = objective(PLANLESS, energy_weight=0.0, likelihood_weight=1.0, anchor_weight=1.0).flops_per_token()
    np.testing.assert_allclose(aimed - cheap.flops_per_token(), target + 3 * 2 * 16 * Z / K)
    assert cheap.samples_needed == 0 and cheap.flops_per_token() < objective(WRITER, likelihood_weight=1.0).flops_per_token()


@pytest.mark.parametrize(
    ("writer", "terms", "message"),
    [
        (WRITER, {}, "likelihood_weight must be above 0: nothing else trains the context decoder"),
        (None, dict(energy_weight=0.0, auxiliary_weight=1.0), "no term trains the head"),
        (None, dict(anchor_weight=-1.0), "anchor_weight must not be negative"),
        (None, dict(likelihood_weight=1.0, likelihood_samples=5), "likelihood_samples must lie in 1..num_samples=4"),
    ],
)
def test_terms_that_cannot_train_are_refused(writer, terms, message):
    with pytest.raises(UsageError, match=message):
        objective(writer, **terms)


def test_a_model_with_a_writer_survives_splitting():
    module = objective(WRITER, likelihood_weight=1.0)
    assert nnx.state(module.module(module.init(jax.random.key(0))).context_decoder)
