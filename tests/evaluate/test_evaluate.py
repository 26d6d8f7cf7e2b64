"""Evaluation: the device's one pass over blocks equals scoring every position by hand, for models and baselines
alike.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.brier_lm import TextProtocol, brier_argmax, brier_drawn
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector
from calm.errors import UsageError
from calm.evaluate.blocks import evaluate_autoencoder, evaluate_ngrams, score_ngram
from calm.evaluate.brier import evaluate_predictor
from calm.evaluate.ngram import exact_brier, fit_ngrams
from calm.evaluate.scores import BrierReport, compare
from calm.rng import stream

VOCABULARY, CHUNK, SAMPLES = 11, 4, 3
KEY = jax.random.key(7)
BLOCKS = np.random.default_rng(0).integers(0, VOCABULARY, (5, 20))
DOCUMENT = np.array([0, 0, 1, 2, 2])
TEXT = TextProtocol(dataset="toy", sha256="ab" * 32, split="valid", tokenizer="f" * 16, block_tokens=20, chunk_size=CHUNK)


@dataclasses.dataclass
class ArraySplit:
    tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length]


def build(chunk_size: int = CHUNK, fresh: bool = False):
    sizes = dict(vocab_size=VOCABULARY, chunk_size=chunk_size, latent_dim=6)
    autoencoder = AutoencoderConfig(**sizes, dim=16, inner_dim=16, embedding_std=1.0).build(rngs=nnx.Rngs(0))
    backbone = BackboneConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=16)
    head = EnergyHeadConfig(num_blocks=1, noise_dim=4)
    lm = LatentLMConfig(**sizes, backbone=backbone, head=head).build(rngs=nnx.Rngs(1))
    if not fresh:  # a new head gives every sample the same latent; let noise and context matter
        lm.head.out.kernel[...] = jax.random.normal(jax.random.key(2), lm.head.out.kernel[...].shape)
    return autoencoder, lm


def evaluate(models, *arguments, **options):
    return evaluate_predictor(NextVector(*models), *arguments, **options)


@pytest.fixture(scope="module")
def models():
    return build()


@nnx.jit
def latents_by_hand(lm, row, position):
    """Samples for one position of one block when all that comes later is blotted out."""
    chunks = jnp.asarray(BLOCKS, jnp.int32)[row].reshape(-1, CHUNK)
    past = jnp.where(jnp.arange(len(chunks))[:, None] <= position, chunks, 0)
    hidden = lm.hidden(past[None])[0][0, position]
    noise = lm.head.draw_noise(jax.random.fold_in(stream(KEY, "samples"), row), (SAMPLES, len(chunks) - 1))[:, position]
    return lm.head(hidden[None], noise[:, None])[:, 0]


@pytest.mark.parametrize("decoding", ["argmax", "drawn"])
def test_scores_are_those_of_each_position_given_its_past(models, decoding):
    autoencoder, lm = models
    report = evaluate(models, BLOCKS, DOCUMENT, KEY, num_samples=SAMPLES, decoding=decoding, batch_size=2, text=TEXT)
    chunks = jnp.asarray(BLOCKS[4].reshape(-1, CHUNK), jnp.int32)
    logits = jnp.stack([autoencoder.logits(latents_by_hand(lm, 4, position)) for position in range(4)], 1)
    by_hand = brier_argmax(logits.argmax(-1), chunks[1:]) if decoding == "argmax" else brier_drawn(logits, chunks[1:])
    np.testing.assert_allclose(report.scores.total[4], by_hand.sum(0), atol=1e-4)
    assert report.protocol.decoding == decoding and report.protocol.num_samples == SAMPLES
    np.testing.assert_array_equal(report.scores.count, 4)


def test_the_batch_size_does_not_move_a_score(models):
    whole, single = (evaluate(models, BLOCKS, DOCUMENT, KEY, num_samples=SAMPLES, batch_size=size) for size in (5, 2))
    np.testing.assert_allclose(whole.scores.total, single.scores.total, atol=1e-5)
    np.testing.assert_allclose(whole.energy.total, single.energy.total, rtol=1e-4)
    assert whole.tokens_per_second > 0


def test_a_fresh_model_reads_zero():
    report = evaluate(build(fresh=True), BLOCKS, DOCUMENT, KEY)
    assert report.brier_lm.estimate == 0
    assert report.brier_n[3].estimate == pytest.approx(-100)


def test_reports_survive_the_disk_and_are_compared_block_by_block(models, tmp_path):
    one = evaluate(models, BLOCKS, DOCUMENT, KEY, num_samples=SAMPLES, batch_size=2, text=TEXT, name="one")
    one.save(tmp_path / "scores.json")
    two = dataclasses.replace(BrierReport.load(tmp_path / "scores.json"), name="two")
    np.testing.assert_array_equal(one.scores.total, two.scores.total)
    assert two.to_dict()["brier_n"] == one.to_dict()["brier_n"]
    comparison = compare(one, two)
    assert comparison.verdict == "undecided" and comparison.difference.brier_n[0].estimate == 0
    assert "one - two" in comparison.table() and "toy (abababababab) valid" in one.table(markdown=True)
    other = dataclasses.replace(two, protocol=dataclasses.replace(two.protocol, tokenizer="other"))
    with pytest.raises(UsageError, match="tokenizer is f{16} on one side and other"):
        compare(one, other)
    with pytest.raises(UsageError, match="no sums of blocks"):
        BrierReport.from_dict(one.to_dict())


def test_baselines_are_scored_at_the_same_positions():
    split = ArraySplit(np.random.default_rng(1).integers(0, VOCABULARY, 400))
    reports = evaluate_ngrams(split, VOCABULARY, BLOCKS, DOCUMENT, chunk_size=CHUNK, text=TEXT)
    bigram = fit_ngrams(split, VOCABULARY)[1]
    expected = sum(exact_brier(bigram, BLOCKS[2, i : i + 1], BLOCKS[2, None, i + 1 : i + 5])[0] for i in (3, 7, 11, 15))
    np.testing.assert_allclose(reports["bigram"].scores.total[2], expected)
    np.testing.assert_array_equal(reports["bigram"].likelihood.count, 16)
    assert 1.5 < reports["unigram"].nats_per_token.estimate < 3.5
    assert "closed form" in reports["unigram"].table()


def test_autoencoder_scores_are_those_of_its_own_methods(models):
    autoencoder = models[0]
    report = evaluate_autoencoder(autoencoder, BLOCKS, DOCUMENT, KEY, noise=(0.3, 100.0), batch_size=2, text=TEXT)
    chunks = jnp.asarray(BLOCKS.reshape(-1, CHUNK), jnp.int32)
    posterior = autoencoder.encode(chunks)
    right = np.asarray(autoencoder.decode(posterior.mean)) == np.asarray(chunks)
    mean, std, kl = (np.asarray(value) for value in (posterior.mean, posterior.std, posterior.kl()))
    assert report.token_accuracy.estimate == pytest.approx(right.mean(), abs=1e-6)
    assert report.chunk_accuracy.estimate == pytest.approx(right.all(-1).mean(), abs=1e-6)
    spread = np.sqrt(mean.var(0) + np.square(std).mean(0))
    assert report.aggregate_std == pytest.approx(spread.mean(), rel=1e-4)
    assert report.posterior_std_relative == pytest.approx((std.mean(0) / spread).mean(), rel=1e-4)
    keys = [jax.random.fold_in(stream(KEY, "noise"), row) for row in range(5)]
    noise = jnp.concatenate([jax.random.normal(key, (5, 6)) for key in keys])
    sampled = np.asarray(autoencoder.decode(posterior.mean + posterior.std * noise)) == np.asarray(chunks)
    assert report.sampled.tokens.estimate == pytest.approx(sampled.mean(), abs=1e-6) != right.mean()
    assert report.kl == pytest.approx(kl.sum(-1).mean(), rel=1e-4)
    assert [each.sigma for each in report.noise] == pytest.approx([0, 0.3, 100])
    assert report.noise[1].relative == pytest.approx((0.3 / spread).mean(), rel=1e-4)
    assert report.to_dict()["noise"][0]["tokens"]["estimate"] == report.token_accuracy.estimate
    assert "posterior sample" in report.table()


def test_noise_that_drowns_the_latent_makes_accuracy_chance():
    autoencoder = build()[0]
    blocks = np.random.default_rng(3).integers(0, VOCABULARY, (40, 100))
    drowned = evaluate_autoencoder(autoencoder, blocks, np.arange(40), KEY, noise=(1000.0,)).noise[1]
    assert drowned.tokens.estimate == pytest.approx(1 / VOCABULARY, abs=0.03)


def test_scalars_for_the_training_log_are_the_estimates(models):
    report = evaluate(models, BLOCKS, DOCUMENT, KEY, num_samples=SAMPLES, batch_size=2)
    scalars = report.scalars()
    assert scalars["brier_1"] == pytest.approx(report.brier_n[0].estimate)
    assert scalars["brier_lm"] == pytest.approx(report.brier_lm.estimate)
    assert scalars["energy_loss"] == pytest.approx(report.energy_loss.estimate)
    autoencoder = evaluate_autoencoder(models[0], BLOCKS, DOCUMENT, KEY, noise=(0.3,), batch_size=2)
    assert autoencoder.scalars()["token_accuracy"] == autoencoder.token_accuracy.estimate
    assert "token_accuracy_noise_0.3" in autoencoder.scalars()


def test_bad_input_is_named(models):
    with pytest.raises(UsageError, match="whole number of them"):
        evaluate(models, BLOCKS[:, :18], DOCUMENT, KEY)
    with pytest.raises(UsageError, match="5 blocks, 4 entries"):
        evaluate(models, BLOCKS, DOCUMENT[:4], KEY)
    with pytest.raises(UsageError, match="at least 2"):
        evaluate(models, BLOCKS, DOCUMENT, KEY, num_samples=1)
    with pytest.raises(UsageError, match="blocks of 40 tokens"):
        evaluate_autoencoder(models[0], BLOCKS, DOCUMENT, KEY, text=dataclasses.replace(TEXT, block_tokens=40))
    unigram = fit_ngrams(ArraySplit(np.arange(5)), VOCABULARY)[0]
    with pytest.raises(UsageError, match="at least 2 chunks"):
        score_ngram(unigram, BLOCKS[:, :4], DOCUMENT, chunk_size=4)
