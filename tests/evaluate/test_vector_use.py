"""Use of the vector: planted models that ignore it and that need it, thresholds, real models of random weights."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.brier_lm import TextProtocol
from calm.core.energy_head import EnergyHeadConfig
from calm.core.gaussian import Gaussian
from calm.core.intervals import BlockSums
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector, Noise
from calm.core.transformer import TransformerConfig
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.errors import UsageError
from calm.evaluate.likelihood import SHARES
from calm.evaluate.ngram import Unigram
from calm.evaluate.vector_use import KINDS, NoVectorUse, VectorUse, measure_vector_use, other_texts
from calm.rng import stream
from random_models import random_model

V, K, STAY, SHARP, S = 8, 2, 0.7, 5.0, 4
KEY = jax.random.key(3)
DOCUMENT = np.repeat(np.arange(40), 2)


def follow(state, noise):
    """A walk over V states: the likeliest next one with probability STAY, else any."""
    return jnp.where(noise[..., 0] < STAY, (3 * state + 1) % V, (noise[..., 1] * V).astype(int))


def walk(rows: int, chunks: int) -> np.ndarray:
    """Text in which each chunk is K times the letter of its state."""
    state, generator, written = np.arange(rows) % V, np.random.default_rng(0), []
    for _ in range(chunks):
        written.append(state)
        state = np.asarray(follow(state, generator.random((rows, 2))))
    return np.repeat(np.stack(written, 1), K, axis=1)


BLOCKS = walk(len(DOCUMENT), 12)


class Codec(nnx.Module):
    """The latent of a chunk is its first letter, one-hot."""

    def encode(self, chunks):
        mean = jax.nn.one_hot(chunks[..., 0], V)
        return Gaussian(mean, jnp.full_like(mean, -3.0))


class Head(nnx.Module):
    """Draws the next letter of the walk."""

    def __call__(self, hidden, noise):
        return jax.nn.one_hot(follow(hidden.argmax(-1), noise), V)


class Planted(nnx.Module):
    """Tokens are drawn from softmax(SHARP * letter): the vector's letter, or the likeliest by the hidden state alone."""

    chunk_size, vocab_size, reach, decoding, precision = K, V, 0, "drawn", "float32"

    def __init__(self, *, reads: bool):
        self.reads, self.autoencoder, self.lm = reads, Codec(), nnx.Module()
        self.lm.head = Head()

    def hidden(self, chunks, state=None):
        return jax.nn.one_hot(chunks[..., 0], V), state

    def draw_noise(self, key, shape, decoding="argmax"):
        return Noise(jax.random.uniform(key, (*shape, 2)), None)

    def logits(self, hidden, latents):
        known = jnp.broadcast_to(jax.nn.one_hot((3 * hidden.argmax(-1) + 1) % V, V), latents.shape)
        return SHARP * (latents if self.reads else known)

    def token_log_probs(self, hidden, previous, latents, targets):
        log_probs = jax.nn.log_softmax(self.logits(hidden, latents))[..., None, :]
        wanted = jnp.broadcast_to(targets, (len(latents), *targets.shape))
        return jnp.take_along_axis(log_probs, wanted[..., None], axis=-1)[..., 0]

    def write_latents(self, hidden, previous, latents, uniforms, *, decoding="argmax", table=None):
        below = jnp.cumsum(jax.nn.softmax(self.logits(hidden, latents)), -1)[..., None, :]
        return (uniforms[..., :1] > below).sum(-1).clip(0, V - 1)


def measured(predictor, blocks=BLOCKS, document=DOCUMENT, **options):
    return measure_vector_use(predictor, blocks, document, KEY, **dict(num_samples=S) | options)


def test_a_decoder_that_ignores_its_vector_is_the_same_under_every_vector():
    use = measured(Planted(reads=False))
    rows = use.sums.total[:, :-1].reshape(len(BLOCKS), len(KINDS), -1)
    np.testing.assert_array_equal(rows, rows[:, :1].repeat(len(KINDS), 1))
    assert use.verdict == "unused" and use.label == "decoder without a vector"
    assert use.cost("foreign").estimate == 0 and use.cost("foreign").high == 0
    assert use.rate.estimate == 0 and use.written_rate.estimate == pytest.approx(0, abs=1e-6)
    assert "decoder without a vector" in use.table() and use.to_dict()["label"] == use.label


def test_a_decoder_that_needs_its_vector_pays_for_any_other():
    use = measured(Planted(reads=True), num_samples=16)
    assert use.verdict == "used" and use.label == ""
    costs = {kind: use.cost(kind) for kind in KINDS}
    assert costs["own"].estimate == 0 and costs["true"].high < 0
    assert all(costs[kind].low > 0.3 for kind in ("foreign", "previous", "zero"))
    assert use.nats("zero").estimate == pytest.approx(math.log(V), abs=1e-5)  # no logit differs
    right = math.log1p((V - 1) * math.exp(-SHARP))
    assert use.nats("true").estimate == pytest.approx(right, abs=1e-5) == pytest.approx(use.nats_of_one("true").estimate)
    assert use.brier_n("true")[0].estimate > use.brier_n("own")[0].low > use.brier_n("foreign")[0].high
    # I(letter; written chunk) for the head's distribution: below its entropy, and close, as the decoder is sharp
    shares = np.full(V, (1 - STAY) / V) + STAY * np.eye(V)[0]
    entropy = -(shares * np.log(shares)).sum()
    assert 0.6 * entropy < use.written_rate.estimate < min(entropy, math.log(16))
    assert 0 < use.rate.estimate < K * math.log(V)
    scalars = use.scalars()
    assert scalars["vector_rate"] == pytest.approx(use.rate.estimate)
    assert scalars["vector_cost"] == pytest.approx(costs["foreign"].estimate)
    assert scalars["written_rate"] == pytest.approx(use.written_rate.estimate)


def test_sums_equal_a_plain_computation_and_do_not_depend_on_the_batch():
    predictor = Planted(reads=True)
    use = measured(predictor)
    for batch_size in (1, 7):
        np.testing.assert_allclose(measured(predictor, batch_size=batch_size).sums.total, use.sums.total, rtol=1e-5)
    own = []
    for row in range(len(BLOCKS)):
        key = jax.random.fold_in(stream(KEY, "own"), row)
        hidden, _ = predictor.hidden(BLOCKS[row].reshape(-1, K)[:-1])
        own.append(predictor.lm.head(hidden, predictor.draw_noise(key, (S, len(hidden))).latent))
    own, other, size = np.asarray(own), other_texts(DOCUMENT), math.log(math.exp(SHARP) + V - 1)
    for kind, latents in (("own", own), ("foreign", own[other])):
        nats, single = 0.0, 0.0
        for row in range(len(BLOCKS)):
            for place, letter in enumerate(BLOCKS[row].reshape(-1, K)[1:, 0]):
                chunk = [K * (SHARP * latents[row, s, place, letter] - size) for s in range(S)]
                nats -= math.log(np.exp(chunk).mean())
                single -= np.mean(chunk)
        count = K * use.sums.count.sum()
        assert use.nats(kind).estimate == pytest.approx(nats / count, rel=1e-4)
        assert use.nats_of_one(kind).estimate == pytest.approx(single / count, rel=1e-4)


@pytest.mark.parametrize(
    ("cost", "gain", "verdict", "label"),
    [
        (0.31, 1.0, "used", ""),
        (0.29, 1.0, "weak", ""),
        (0.051, 0.0, "weak", ""),
        (0.049, 0.0, "unused", "decoder without a vector"),
        (-0.4, 0.0, "unused", "decoder without a vector"),
        (0.0, 2.0, "unused", "vectors without text"),
    ],
)
def test_thresholds_are_those_of_the_description(cost, gain, verdict, label):
    text = TextProtocol(dataset="d", sha256="s", split="valid", tokenizer="t", block_tokens=8, chunk_size=4)
    nats = {"own": 3.0, "foreign": 3.0 + cost, "previous": 3.0, "zero": 3.5, "true": min(3.0 + cost, 3.5) - gain}
    row = [part for kind in KINDS for part in (4 * nats[kind], 4 * nats[kind], 0.1, 0.0, 0.0, 0.0)] + [0.0]
    sums = BlockSums(total=np.tile(row, (3, 1)), count=np.ones(3), document=np.arange(3), block_tokens=8)
    use = VectorUse(name="m", protocol=text, sums=sums, num_samples=2, decoding="drawn")
    assert (use.verdict, use.label) == (verdict, label)
    assert use.rate.estimate == pytest.approx(4 * max(0.0, min(cost, 0.5)))
    assert use.scalars()["vector_cost"] == pytest.approx(cost)


def next_vector(seed=0, **options):
    sizes = dict(vocab_size=V, chunk_size=K, latent_dim=6)
    backbone = TransformerConfig(dim=8, num_layers=1, num_heads=1, num_kv_heads=1, inner_dim=8)
    lm = LatentLMConfig(**sizes, backbone=backbone, head=EnergyHeadConfig(num_blocks=1, noise_dim=4), **options)
    return NextVector(random_model(AutoencoderConfig(**sizes, dim=8, inner_dim=8), seed), random_model(lm, seed))


def test_a_decoder_inside_the_chunk_is_unused_where_its_weights_for_the_vector_are_zero():
    predictor = next_vector(context_decoder=ContextDecoderConfig(dim=8, window=3, table_dim=8, inner_dim=8, recall=0))
    reading = measured(predictor)
    assert reading.share is None and reading.decoding == "drawn" and reading.cost("foreign").estimate != 0
    kernel = predictor.lm.context_decoder.from_latent.kernel
    kernel[...] = jnp.zeros_like(kernel[...])
    use = measured(predictor)
    rows = use.sums.total[:, :-1].reshape(len(BLOCKS), len(KINDS), -1)
    np.testing.assert_array_equal(rows, rows[:, :1].repeat(len(KINDS), 1))
    assert use.verdict == "unused" and use.written_rate.estimate == pytest.approx(0, abs=1e-6)


UNIGRAM = Unigram.from_counts(np.bincount(BLOCKS.reshape(-1), minlength=V))
SMOOTHED = dict(unigram=UNIGRAM, calibration=walk(90, 12)[80:], fitted_on="ten other walks")


def test_a_model_of_the_paper_is_smoothed_on_text_that_is_not_scored():
    use = measured(next_vector(), **SMOOTHED)
    assert use.share in SHARES and use.decoding == "argmax" and "ten other walks" in use.table()
    # Under the zero vector every position has one distribution, the smoothed decoder's
    log_probs = jax.nn.log_softmax(next_vector().autoencoder.logits(jnp.zeros(6)))
    mixed = (1 - use.share) * np.exp(log_probs) + use.share * UNIGRAM.probability
    expected = -np.log(mixed[np.arange(K), BLOCKS[:, K:].reshape(-1, K)]).mean()
    assert use.nats("zero").estimate == pytest.approx(expected, rel=1e-4)
    assert use.brier_n("zero")[0].estimate <= 100 and len(use.brier_n("true")) == K


def test_foreign_texts_are_of_another_document_where_there_is_one():
    other = other_texts(DOCUMENT)
    assert (DOCUMENT[other] != DOCUMENT).all() and measured(Planted(reads=True)).same_document == 0
    for rows in (2, 3, 5):
        document = np.zeros(rows, int)
        assert (other_texts(document) != np.arange(rows)).all()
        use = measured(Planted(reads=True), BLOCKS[:rows], document)
        assert use.same_document == 1 and "have no other document" in use.table()
    np.testing.assert_array_equal(other_texts(np.array([0, 0, 0, 1])), [3, 3, 3, 1])  # half way round, then on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_samples=1), "num_samples must be at least 2"),
        (dict(decoding="greedy"), "argmax or drawn"),
        (dict(blocks=BLOCKS[:1], document=DOCUMENT[:1]), "2 blocks of 3 chunks"),
        (dict(blocks=BLOCKS[:, : 2 * K]), "2 blocks of 3 chunks"),
        (dict(document=DOCUMENT[:3]), "document must name"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        measured(Planted(reads=True), **options)


def test_smoothing_needs_text_that_is_not_scored():
    with pytest.raises(UsageError, match="give a unigram and calibration"):
        measured(next_vector())
    with pytest.raises(UsageError, match="cannot also choose the smoothing"):
        measured(next_vector(), **SMOOTHED | dict(calibration=BLOCKS[:3]))


def test_a_model_without_a_vector_says_so():
    none = NoVectorUse(name="token LM", reason="a token model predicts no vector")
    assert none.table() == "token LM: no vector; a token model predicts no vector" and none.scalars() == {}
    assert none.to_dict()["verdict"] == "no vector" and dataclasses.replace(none, verdict="not measured").label == ""
