"""Likelihood bounds: the arithmetic, and planted models whose likelihood is a finite sum or an integral."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.brier_lm import TextProtocol
from calm.core.chunk_decoder import recent_tokens
from calm.core.cross_entropy import plain_cross_entropy, target_log_prob
from calm.core.gaussian import Gaussian
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector, Noise
from calm.core.transformer import TransformerConfig
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.errors import UsageError
from calm.evaluate.likelihood import (
    SHARES,
    LatentPredictor,
    bound_curve,
    evaluate_likelihood,
    log_mean_exp,
    sample_sizes,
    smoothed,
)
from calm.evaluate.ngram import Unigram
from planted_decoder import PlantedDecoder
from random_models import random_model

V, K, Z, CHOICES = 9, 2, 6, 4
BLOCKS = np.random.default_rng(0).integers(0, V, (24, 10))
CALIBRATION = np.random.default_rng(1).integers(0, V, (3, 10))
DOCUMENT = np.arange(24)
UNIGRAM = Unigram.from_counts(np.bincount(BLOCKS.reshape(-1), minlength=V))
KEY = jax.random.key(5)


class FiniteHead(nnx.Module):
    """Noise in [0, 1) picks one of a few latents, with probabilities that the hidden state decides."""

    def __init__(self):
        self.latents = nnx.Param(2.0 * jax.random.normal(jax.random.key(0), (CHOICES, Z)))

    def draw_noise(self, key, shape):
        return jax.random.uniform(key, (*shape, 1))

    def __call__(self, hidden, noise):
        below = jnp.cumsum(jax.nn.softmax(hidden), -1)[..., :-1]
        return self.latents[...][(noise > below).sum(-1)]


class GaussianHead(nnx.Module):
    """A normal around a linear map of the hidden state: a density is known."""

    def __init__(self):
        self.kernel = nnx.Param(0.5 * jax.random.normal(jax.random.key(0), (CHOICES, Z)))

    def draw_noise(self, key, shape):
        return jax.random.normal(key, (*shape, Z))

    def __call__(self, hidden, noise):
        return hidden @ self.kernel[...] + noise

    def log_density(self, hidden, latents):
        return (-0.5 * (latents - hidden @ self.kernel[...]) ** 2 - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


class Coder(nnx.Module):
    """A random decoder, and an encoder whose posterior is as wide as what the heads here give."""

    precision = "float32"

    def __init__(self):
        sizes = dict(vocab_size=V, chunk_size=K, latent_dim=Z, dim=16, inner_dim=16)
        self.inner = random_model(AutoencoderConfig(**sizes))

    @property
    def table(self):
        return self.inner.table

    def decode_states(self, latents):
        return self.inner.decode_states(latents)

    def encode(self, chunks):
        mean = jnp.zeros((*chunks.shape[:-1], Z))
        return Gaussian(mean, mean + 0.3)


class Planted(nnx.Module):
    """A predictor whose hidden state is looked up by the first token of a chunk, around a head and a random autoencoder."""

    precision, decoding, num_layers, vocab_size, chunk_size, reach = "float32", "argmax", 0, V, K, 0
    init_state, fork, rewind = NextVector.init_state, NextVector.fork, NextVector.rewind
    write, write_latents = NextVector.write, NextVector.write_latents
    token_log_probs = NextVector.token_log_probs

    def __init__(self, head):
        self.autoencoder = Coder()
        self.hiddens = nnx.Param(jax.random.normal(jax.random.key(1), (V, CHOICES)))
        self.lm = nnx.Module()
        self.lm.head, self.lm.context_decoder = head, None

    @property
    def decoder(self):
        return PlantedDecoder(self.autoencoder)

    @property
    def table(self):
        return self.autoencoder.table

    def hidden(self, chunks, state=None):
        return self.hiddens[...][chunks[..., 0]], state

    def draw_noise(self, key, shape, decoding="argmax"):
        return Noise(self.lm.head.draw_noise(key, shape), None)


def bound(head, num_samples=64, seed=0, **options):
    arguments = dict(unigram=UNIGRAM, calibration=CALIBRATION, fitted_on="other blocks", num_bytes=100)
    return evaluate_likelihood(
        Planted(head), BLOCKS, DOCUMENT, jax.random.fold_in(KEY, seed), num_samples=num_samples, **arguments | options
    )


def exact_nats(head, share, blocks=BLOCKS):
    """-log p of each block's chunks: a sum over the latents that the head can give."""
    model, chunks = Planted(head), jnp.asarray(blocks, jnp.int32).reshape(len(blocks), -1, K)
    hidden, targets = model.hidden(chunks[:, :-1])[0], chunks[:, 1:]
    probabilities = jax.nn.softmax(model.autoencoder.inner.logits(head.latents[...]))  # [CHOICES K V]
    mixed = (1 - share) * probabilities + share * jnp.asarray(UNIGRAM.probability, jnp.float32)
    of_target = mixed[:, jnp.arange(K), targets].prod(-1)  # [CHOICES B N]
    return -jnp.log((jnp.moveaxis(jax.nn.softmax(hidden), -1, 0) * of_target).sum(0)).sum(1)


def written_by(head, share, rows=40):
    """Blocks that the smoothed model itself would write."""
    model, generator = Planted(head), np.random.default_rng(3)
    of_latent = np.asarray(jax.nn.softmax(model.autoencoder.inner.logits(head.latents[...])))
    of_hidden = np.asarray(jax.nn.softmax(model.hiddens[...]))
    blocks = np.zeros((rows, BLOCKS.shape[1]), int)
    for row in blocks:
        for place in range(K, len(row), K):
            latent = generator.choice(CHOICES, p=of_hidden[row[place - K]])
            mixed = (1 - share) * of_latent[latent] + share * UNIGRAM.probability
            row[place : place + K] = [generator.choice(V, p=p / p.sum()) for p in mixed]
    return blocks


def test_planted_models_are_predictors():
    assert isinstance(Planted(FiniteHead()), LatentPredictor)


def test_the_bound_meets_a_finite_sum_from_above_and_falls_with_s():
    head = FiniteHead()
    calibration = written_by(head, share=0.02)
    reports = [bound(head, seed=seed, calibration=calibration) for seed in range(4)]
    gaps = np.concatenate([report.nats.total - np.asarray(exact_nats(head, report.share))[:, None] for report in reports])
    mean, error = gaps.mean(0), gaps.std(0) / np.sqrt(len(gaps))
    assert (mean > -3 * error).all(), (mean, error)
    assert (np.diff(mean) < 0).all() and mean[-1] < mean[0] / 10 and mean[0] > 0.1, mean
    assert reports[0].sizes == (1, 2, 4, 8, 16, 32, 64)
    assert reports[0].nats.count.sum() == BLOCKS.size - len(BLOCKS) * K


def test_the_encoders_proposal_bounds_the_same_number():
    report = bound(GaussianHead(), num_samples=256)
    prior, encoder = (sums.means for sums in (report.nats, report.encoder))
    assert (np.diff(prior) < 0.01).all() and (np.diff(encoder) < 0.01).all()
    assert encoder[-1] == pytest.approx(prior[-1], abs=0.02)
    assert "from the encoder" in report.table() and bound(FiniteHead()).encoder is None


def test_the_share_is_the_best_on_the_calibration_blocks_and_is_stamped():
    head = FiniteHead()
    calibration = written_by(head, share=0.3)
    report = bound(head, calibration=calibration)
    exact = jax.jit(jax.vmap(lambda share: exact_nats(head, share, calibration).sum()))(jnp.asarray(SHARES))
    assert abs(SHARES.index(report.share) - int(exact.argmin())) <= 1 and 0.15 < report.share < 0.5
    assert report.to_dict()["protocol"]["smoothing_share"] == report.share and "fitted on other blocks" in report.table()


def test_known_models_stand_beside_it_in_the_same_units():
    report = bound(FiniteHead())
    values = report.to_dict()
    assert values["uniform"]["perplexity"] == pytest.approx(V)
    assert values["uniform"]["bits_per_byte"] == pytest.approx(np.log2(V) * values["scored_tokens"] / 100)
    expected = -np.log(UNIGRAM.probability)[BLOCKS[:, K:]].mean()
    assert values["unigram"]["nats_per_token"] == pytest.approx(expected)
    assert report.scalars()["nats_per_token_bound"] == pytest.approx(report.nats_per_token.estimate)
    assert {"uniform", "unigram"} <= {row.split()[0] for row in report.table().splitlines() if row}


def test_neither_batch_size_nor_the_number_of_samples_after_it_moves_a_sample():
    whole, single = (bound(FiniteHead(), batch_size=size) for size in (None, 5))
    np.testing.assert_allclose(whole.nats.total, single.nats.total, rtol=1e-4)


def test_bad_input_is_refused():
    with pytest.raises(UsageError, match="at least 1 sample"):
        bound(FiniteHead(), num_samples=0)
    with pytest.raises(UsageError, match="vocabulary of 3, the model one of 9"):
        bound(FiniteHead(), unigram=Unigram.from_counts(np.ones(3, int)))
    with pytest.raises(UsageError, match="calibration: a block that is scored"):
        bound(FiniteHead(), calibration=BLOCKS[3:4])
    with pytest.raises(UsageError, match="at least one block of 10 tokens"):
        bound(FiniteHead(), calibration=BLOCKS[:0])
    text = TextProtocol(dataset="d", sha256="s", split="valid", tokenizer="t", block_tokens=20, chunk_size=K)
    with pytest.raises(UsageError, match="protocol says blocks of 20"):
        bound(FiniteHead(), text=text)


def test_a_decoder_inside_the_chunk_that_reads_no_latent_has_an_exact_likelihood():
    sizes = dict(vocab_size=V, chunk_size=K, latent_dim=Z)
    backbone = TransformerConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=2, inner_dim=16)
    writer = ContextDecoderConfig(dim=16, inner_dim=16, num_layers=1, table_dim=8, use_latent=False)
    lm = LatentLMConfig(**sizes, backbone=backbone, context_decoder=writer).build(rngs=nnx.Rngs(0))
    codec = random_model(AutoencoderConfig(**sizes, dim=16, inner_dim=16))
    arguments = dict(unigram=UNIGRAM, calibration=CALIBRATION, fitted_on="other blocks", num_bytes=100, num_samples=2)
    report = evaluate_likelihood(NextVector(codec, lm), BLOCKS, DOCUMENT, KEY, **arguments)
    chunks = jnp.asarray(BLOCKS, jnp.int32).reshape(len(BLOCKS), -1, K)
    hidden, _ = lm.hidden(chunks[:, :-1])
    previous = recent_tokens(chunks[:, :-1], writer.window)
    states = lm.context_decoder.teacher_forced(lm.context_decoder.plan(hidden, None), previous, chunks[:, 1:])[0]
    probabilities = jax.nn.softmax(states @ lm.context_decoder.table.T)
    mixed = (1 - report.share) * probabilities + report.share * jnp.asarray(UNIGRAM.probability, jnp.float32)
    nats = -jnp.log(jnp.take_along_axis(mixed, chunks[:, 1:, :, None], -1)).sum((1, 2, 3))
    np.testing.assert_allclose(report.nats.total, np.broadcast_to(nats[:, None], (len(BLOCKS), 2)), rtol=1e-4)


WEIGHTS = np.array([0.05, 0.15, 0.3, 0.5])
LOG_PROBS = np.log([0.9, 0.02, 1e-5, 0.1])  # of the target chunk under each of four latents
TRUTH = np.log(np.sum(WEIGHTS * np.exp(LOG_PROBS)))


def test_the_gap_is_never_negative_and_falls_with_the_number_of_samples():
    sizes = (1, 2, 4, 16, 64)
    picks = np.random.default_rng(0).choice(4, (64, 4000), p=WEIGHTS)
    gaps = TRUTH - np.asarray(bound_curve(jnp.asarray(LOG_PROBS, jnp.float32)[picks], sizes))
    mean, error = gaps.mean(0), gaps.std(0) / np.sqrt(len(gaps))
    assert (mean > -3 * error).all(), (mean, error)
    assert (np.diff(mean) < 0).all() and mean[0] > 1 and mean[-1] < 0.1, mean
    assert mean[0] == pytest.approx(TRUTH - WEIGHTS @ LOG_PROBS, abs=4 * error[0])  # one sample: the mean of the logarithms


def test_smaller_sizes_are_the_mean_over_groups():
    values = np.random.default_rng(1).normal(size=(7, 5)).astype(np.float32)
    values = jnp.asarray(values)
    curve = bound_curve(values, (1, 3, 7))
    np.testing.assert_allclose(curve[:, 0], values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(curve[:, 1], (log_mean_exp(values[:3]) + log_mean_exp(values[3:6])) / 2, rtol=1e-5)
    np.testing.assert_allclose(curve[:, 2], np.log(np.exp(values).mean(0)), rtol=1e-5)


def test_log_mean_exp_neither_overflows_nor_underflows():
    np.testing.assert_allclose(log_mean_exp(jnp.array([[-1000.0, 1000.0], [-1000.0, -1000.0]])), [-1000, 1000 - np.log(2)])


def test_smoothing_mixes_probabilities_and_stays_a_distribution():
    decoder, unigram = (jax.nn.log_softmax(4 * jax.random.normal(jax.random.key(i), (1, 3, 50))) for i in (0, 1))
    mixed = jnp.exp(smoothed(decoder, unigram[0], 0.1))
    np.testing.assert_allclose(mixed, 0.9 * jnp.exp(decoder) + 0.1 * jnp.exp(unigram), rtol=1e-5)
    np.testing.assert_allclose(mixed.sum(-1), 1, rtol=1e-5)
    impossible = jnp.full((1, 3, 50), -jnp.inf)
    np.testing.assert_allclose(smoothed(impossible, unigram[0], 0.1), jnp.log(0.1) + unigram, rtol=1e-5)


def test_every_size_up_to_the_number_of_samples_is_reported():
    assert sample_sizes(1) == (1,) and sample_sizes(8) == (1, 2, 4, 8) and sample_sizes(12) == (1, 2, 4, 8, 12)
    with pytest.raises(UsageError, match="at least 1 sample"):
        sample_sizes(0)
    assert SHARES[0] == pytest.approx(1e-4, rel=1e-3) and SHARES[-1] == pytest.approx(0.98) and list(SHARES) == sorted(SHARES)


@pytest.mark.parametrize("rows", [1, 512, 700])
def test_target_log_prob_is_cross_entropy_in_blocks(rows):
    hidden, table = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((rows, 8), (30, 8))))
    targets = jax.random.randint(jax.random.key(2), (rows,), 0, 30)
    expected = -plain_cross_entropy(hidden, table, targets)
    np.testing.assert_allclose(target_log_prob(hidden, table, targets), expected, rtol=2e-5, atol=1e-5)
