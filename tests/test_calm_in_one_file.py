"""The paper in one file computes what the package computes, from the same weights and the same draws."""

import importlib.util
import re
from fractions import Fraction
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.brier_lm import brier_argmax, brier_lm
from calm.core.counts import tally
from calm.core.energy_head import EnergyHeadConfig
from calm.core.energy_score import energy_loss, plain_energy_loss
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import (
    AutoencoderLossConfig,
    AutoencoderObjective,
    EnergyTerm,
    LatentLossConfig,
    LatentObjective,
)
from calm.core.temperature import BatchTemperature, log_weights
from calm.core.transformer import TransformerConfig
from calm.evaluate.ngram import Unigram, exact_brier
from calm.rng import stream
from random_models import normal, random_model

ROOT = Path(__file__).parent.parent
PATH = ROOT / "examples" / "calm_in_one_file.py"
SPEC = importlib.util.spec_from_file_location("calm_in_one_file", PATH)
assert SPEC is not None and SPEC.loader is not None
one_file = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(one_file)

BATCH, CHUNKS, SAMPLES, DRAWS, MASK = 2, 7, 3, 5, 10
C = one_file.Config(
    vocab_size=11,
    latent_dim=6,
    autoencoder_dim=8,
    autoencoder_inner_dim=12,
    context=CHUNKS,
    dim=16,
    inner_dim=20,
    num_layers=3,
    num_head_blocks=2,
    noise_dim=5,
    num_samples=SAMPLES,
    num_draws=DRAWS,
)
AUTOENCODER = AutoencoderConfig(
    vocab_size=11, chunk_size=4, latent_dim=6, dim=8, inner_dim=12, encoder_layers=2, decoder_layers=2
)
LM = LatentLMConfig(
    vocab_size=11,
    chunk_size=4,
    latent_dim=6,
    backbone=TransformerConfig(dim=16, num_layers=3, num_heads=4, num_kv_heads=2, inner_dim=20),
    head=EnergyHeadConfig(num_blocks=2, noise_dim=5),
)
KEY = jax.random.key(7)


def nested(weights):
    """The package's weights by name, as dictionaries; stacked layers keep their leading axis."""
    tree = {}
    for path, variable in nnx.to_flat_state(weights):
        *parents, last = (name for name in path if name != "layer")
        branch = tree
        for name in parents:
            branch = branch.setdefault(name, {})
        branch[last] = variable.get_value()
    return tree


def unstacked(layers):
    length = len(jax.tree.leaves(layers)[0])
    return [jax.tree.map(itemgetter(layer), layers) for layer in range(length)]


def autoencoder_weights(weights):
    """As the one file has them: a layer for a stack of one."""
    tree = nested(weights)
    for coder in (tree["encoder"], tree["decoder"]):
        for name in ("token_layer", "chunk_layer"):
            (coder[name],) = unstacked(coder.pop(f"{name}s"))
    return tree


def lm_weights(weights):
    tree = nested(weights)
    backbone, head = tree["backbone"], tree["head"]
    head["blocks"] = unstacked(head["blocks"])
    return {"stem": tree["stem"], "layers": unstacked(backbone["blocks"]), "norm": backbone["norm"], "head": head}


@pytest.fixture(scope="module")
def models():
    """The package's autoencoder and language model, and the same weights as dictionaries."""
    autoencoder, lm = random_model(AUTOENCODER, seed=1), random_model(LM, seed=2)
    return autoencoder, lm, autoencoder_weights(nnx.state(autoencoder)), lm_weights(nnx.state(lm))


def chunks_of(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, MASK, (*shape, 4)))


def agree(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_the_weights_have_the_same_names_and_shapes(models):
    *_, autoencoder, lm = models
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    assert shapes(one_file.init_autoencoder(KEY, C)) == shapes(autoencoder)
    assert shapes(one_file.init_language_model(KEY, C)) == shapes(lm)


def test_encoder_and_decoder(models):
    autoencoder, _, weights, _ = models
    posterior = autoencoder.encode(chunks_of(BATCH, CHUNKS))
    agree(one_file.encode(weights, chunks_of(BATCH, CHUNKS)), [posterior.mean, posterior.log_std])
    latents = jnp.asarray(normal(SAMPLES, BATCH, 6))
    agree(one_file.decode(weights, latents), autoencoder.logits(latents))


def test_stem_transformer_and_head(models):
    autoencoder, lm, frozen, weights = models
    chunks = chunks_of(BATCH, CHUNKS)
    agree(one_file.compress(weights["stem"], chunks), lm.stem(chunks))
    hidden, _ = lm.hidden(chunks)
    agree(one_file.hidden_states(weights, chunks, C), hidden)
    noise = one_file.draw_noise(KEY, (SAMPLES, BATCH, CHUNKS), C)
    agree(noise, lm.head.draw_noise(KEY, (SAMPLES, BATCH, CHUNKS)))
    agree(one_file.energy_head(weights["head"], hidden, noise), lm.head(hidden, noise))
    assert (one_file.draw_chunks(weights, frozen, hidden, noise) == autoencoder.decode(lm.head(hidden, noise))).all()


@pytest.mark.parametrize("equal", [False, True], ids=["different samples", "equal samples"])
def test_energy_loss_and_its_gradient(models, equal):
    autoencoder, *_ = models
    posterior = autoencoder.encode(chunks_of(CHUNKS))
    samples = jnp.zeros((SAMPLES, CHUNKS, 6)) if equal else jnp.asarray(normal(SAMPLES, CHUNKS, 6))
    targets = posterior.draws(KEY, DRAWS)
    agree(one_file.energy_loss(samples, targets), plain_energy_loss(samples, targets))
    agree(one_file.energy_loss(samples, targets), energy_loss(samples, posterior, KEY, num_draws=DRAWS, fidelity="draws"))
    gradients = [jax.grad(lambda x, f=f: f(x, targets).sum())(samples) for f in (one_file.energy_loss, plain_energy_loss)]
    agree(*gradients)
    assert np.isfinite(gradients[0]).all()


def test_the_loss_of_stage_1_and_its_gradient(models):
    autoencoder, _, weights, _ = models
    tokens = chunks_of(BATCH, CHUNKS).reshape(BATCH, -1)
    objective = AutoencoderObjective(AUTOENCODER, AutoencoderLossConfig(kl_weight=0.1, random_chunks=0.0), mask_id=MASK)
    params = nnx.state(autoencoder)
    (theirs, _), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, objective.frozen, tokens, KEY)

    chunks = tokens.reshape(-1, 4)
    masked = jax.random.bernoulli(stream(KEY, "token dropout"), 0.15, chunks.shape)
    noise = jax.random.normal(stream(KEY, "posterior"), (len(chunks), 6))
    kept = jax.random.bernoulli(stream(KEY, "latent dropout"), 0.85, noise.shape) / 0.85
    assert masked.any() and not kept.all(), "the draws must mask and drop something"
    loss = lambda p: one_file.autoencoder_loss(p, chunks, masked, noise, kept, MASK, kl_weight=0.1)  # noqa: E731
    ours, own_gradient = jax.value_and_grad(loss)(weights)
    agree(ours, theirs)
    agree(own_gradient, autoencoder_weights(gradient))


def test_the_loss_of_stage_2_and_its_gradient(models):
    autoencoder, lm, frozen, weights = models
    chunks = chunks_of(BATCH, CHUNKS + 1)
    terms = LatentLossConfig.of(EnergyTerm(num_draws=DRAWS, fidelity="draws"), num_samples=SAMPLES)
    objective = LatentObjective(LM, terms, autoencoder, context=CHUNKS)
    arguments = ({"lm": nnx.state(lm)}, objective.frozen, chunks.reshape(BATCH, -1), KEY)
    (theirs, _), gradient = jax.value_and_grad(objective.loss, has_aux=True)(*arguments)

    head_noise = one_file.draw_noise(stream(KEY, "head"), (SAMPLES, BATCH, CHUNKS), C)
    target_noise = jax.random.normal(stream(KEY, "targets"), (DRAWS, BATCH * CHUNKS, 6)).reshape(DRAWS, BATCH, CHUNKS, 6)
    loss = lambda p: one_file.language_model_loss(p, frozen, chunks, head_noise, target_noise, C)  # noqa: E731
    ours, own_gradient = jax.value_and_grad(loss)(weights)
    agree(ours, theirs)
    agree(own_gradient, lm_weights(gradient["lm"]))


def test_brier_scores():
    samples, targets = chunks_of(6, BATCH, CHUNKS) % 2, chunks_of(BATCH, CHUNKS, seed=1) % 2
    agree(one_file.brier(samples, targets), brier_argmax(samples, targets))
    for means in (np.array([0.3, 0.2, 0.1, 0.05]), np.array([0.3, -0.2, -0.1, 0.05])):
        agree(one_file.brier_lm(means), brier_lm(means))
    probability = np.array([0.5, 0.3, 0.2])
    targets = np.asarray(chunks_of(BATCH, CHUNKS)) % 3
    theirs = exact_brier(Unigram(probability), np.zeros((BATCH, CHUNKS), int), targets)
    agree(one_file.unigram_brier(10 * probability, targets), theirs)


@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("kinds", [2, 10_000], ids=["few chunks", "nearly all different"])
def test_batch_temperature(n, kinds):
    """Weights, and the choice made from them with the same key; with chunks nearly all different the counts fall short of n."""
    size, temperature = 50, Fraction(1, n)
    candidates = jnp.asarray(np.random.default_rng(n).integers(0, kinds, (size, 1)) * np.ones(4, int))
    candidates = candidates.at[7].set(candidates[3])
    weights = one_file.temperature_weights(candidates, n)
    np.testing.assert_allclose(weights, jnp.exp(log_weights(tally(candidates), temperature, size)), rtol=1e-5)
    sampler = BatchTemperature(temperature=temperature, num_candidates=size)
    keys = jax.random.split(KEY, 20)
    ours = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(weights)))(keys)
    theirs, fell_back = jax.vmap(lambda key: sampler.choose(key, candidates))(keys)
    assert (ours == theirs).all()
    assert fell_back.all() == (kinds == 10_000 and n > 2)


def test_generation_goes_through_tokens(models):
    """Each chunk is chosen from what the model draws after the tokens before it, within the context and past its end."""
    _, _, frozen, weights = models
    prompt, length = np.asarray(chunks_of(3)), CHUNKS + 2
    written = one_file.generate(weights, frozen, prompt, length - 3, KEY, C, n=2, num_candidates=20)
    assert written.shape == (length, 4) and (written[:3] == prompt).all()
    for step, place in enumerate(range(3, length)):
        draw, choice = jax.random.split(jax.random.fold_in(KEY, step))
        hidden = one_file.hidden_states(weights, jnp.asarray(written[max(0, place - CHUNKS) : place])[None], C)[0, -1]
        candidates = one_file.draw_chunks(weights, frozen, hidden, one_file.draw_noise(draw, (20,), C))
        chosen, _ = BatchTemperature(temperature=Fraction(1, 2), num_candidates=20).choose(choice, candidates)
        assert (written[place] == candidates[chosen]).all()


def test_both_stages_train_and_are_scored(capsys):
    text = "the cat sees the dog. the dog sees the cat. " * 30
    report = one_file.main(C, text, autoencoder_steps=150, lm_steps=3)
    assert report["round_trip"] > 0.5, "150 steps are enough to learn most tokens of so small a text"
    assert report["unigram"] > 0 and 0 <= report["calm"] <= 100
    said = capsys.readouterr().out
    assert said.count("language model step") == 3 and "BrierLM" in said and "->" in said


def test_it_imports_nothing_of_the_package_and_names_files_that_exist():
    source = PATH.read_text()
    roots = {name.split(".")[0] for name in re.findall(r"^\s*(?:import|from) ([\w.]+)", source, re.MULTILINE)}
    assert not roots & {"calm", "flax"}, roots
    named = re.findall(r"(?<![\w/])\w+\.py", one_file.__doc__)
    missing = [name for name in named if not (ROOT / "src" / "calm" / "core" / name).is_file()]
    assert len(named) > 8 and not missing, missing
