"""BrierLM against exact scores: predictors that draw from a world's law, or a wrong one, at any K, order and phase."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.brier_lm import brier_argmax
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector
from calm.decoders.context_decoder import ContextDecoderConfig, recent_tokens
from calm.errors import UsageError
from calm.evaluate.blocks import evaluate_world, score_ngram
from calm.evaluate.boundaries import boundaries, phases_of
from calm.evaluate.brier import evaluate_predictor
from calm.evaluate.ngram import fit_ngrams
from calm.rng import stream
from calm.token.model import TokenLMConfig
from calm.worlds.registry import build_world
from world_predictors import TokenWorldPredictor, WorldPredictor

KEY = jax.random.key(3)
BLOCK = 24
WORLD = build_world("grammar", depth=0, sentences=4)
MARKOV = build_world("markov", words=6, concentration=0.4, document=40)
WRONG = build_world("markov", words=6, concentration=0.8, document=12, seed=5)
SENTENCES = WORLD.sample(BLOCK * 80, seed=1)[0].reshape(-1, BLOCK)  # blocks that begin anywhere in a document
CHAIN = MARKOV.sample(BLOCK * 160, seed=1)[0].reshape(-1, BLOCK)


def truth_of(law, blocks, every):
    return evaluate_world(law, blocks, np.arange(len(blocks)), boundary_every=every)


def evaluate(predictor, blocks, every, **options):
    begin_id = MARKOV.begin_id if blocks is CHAIN else WORLD.begin_id
    return evaluate_predictor(
        predictor, blocks, np.arange(len(blocks)), KEY, boundary_every=every, begin_id=begin_id, batch_size=120, **options
    )


@pytest.mark.parametrize(("law", "blocks", "every"), [(WORLD, SENTENCES, 1), (MARKOV, CHAIN, 4), (WRONG, CHAIN, 4)])
@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_unbiased_for_every_chunk_size_order_and_phase(chunk_size, law, blocks, every):
    """Within 3 standard errors over blocks, of the sampling alone: the text is fixed, and so are its exact scores."""
    report = evaluate(WorldPredictor(law, chunk_size), blocks, every, num_samples=4)
    exact = truth_of(law, blocks, every)
    assert report.scores.count[0] == exact.scores.count[0] == len(boundaries(BLOCK, every))
    error = report.scores.total - exact.scores.total
    assert (abs(error.mean(0)) < 3 * error.std(0) / np.sqrt(len(blocks))).all(), (error.mean(0), error.std(0))


def test_the_exact_score_is_that_of_reading_each_context_alone():
    places, expected = boundaries(BLOCK, 4), 0
    for place in places:
        hits = WORLD.probability(SENTENCES[:9, :place], SENTENCES[:9, place : place + 4])
        expected += 2 * hits - WORLD.self_match(WORLD.condition(SENTENCES[:9, :place]))
    np.testing.assert_allclose(truth_of(WORLD, SENTENCES[:9], 4).scores.total, expected, atol=1e-9)


def test_chunk_sizes_agree_at_the_common_grid_and_phases_cover_every_token():
    assert all(len(phases_of(1024, size, 4)) == 1 for size in (1, 2, 4)) and len(phases_of(1024, 8, 4)) == 2
    for size in (1, 2, 3, 4, 8):
        phases = phases_of(24, size, 1)
        met = np.concatenate([phase.places[phase.weight > 0] for phase in phases])
        np.testing.assert_array_equal(np.sort(met), np.arange(1, 21))
        for phase in phases:  # what was read ends where the boundary is, and begins with begin ids
            chunks = phase.chunks(np.arange(24)[None], -1).reshape(-1)
            for end, place in zip(phase.ends, phase.places, strict=True):
                assert chunks[end * size - 1] == place - 1
            assert (chunks[: phase.begins] == -1).all() and chunks[phase.begins] == 0


def test_probabilities_make_brier_1_and_the_hits_exact_and_the_rest_unbiased():
    report, truth = evaluate(TokenWorldPredictor(WORLD), SENTENCES, 4, num_samples=4), truth_of(WORLD, SENTENCES, 4)
    error = report.scores.total - truth.scores.total
    assert abs(error[:, 0]).max() < 2e-4
    assert (abs(error.mean(0)[1:]) < 3 * error.std(0)[1:] / np.sqrt(len(SENTENCES))).all()
    sampled = evaluate(WorldPredictor(WORLD, 1), SENTENCES, 4, num_samples=4).scores.total - truth.scores.total
    assert (error.std(0)[1:] < 0.2 * sampled.std(0)[1:]).all()
    np.testing.assert_allclose(report.likelihood.total, truth.likelihood.total, rtol=1e-4)
    assert report.protocol.decoding == "drawn" and truth.protocol.decoding == "exact"


def repeated(predictor, block, times, **options):
    """The same block again and again, each time with its own key."""
    return evaluate_predictor(predictor, np.tile(block, (times, 1)), np.arange(times), KEY, batch_size=500, **options)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_sampling_variance_is_that_of_a_u_statistic(chunk_size):
    """At fixed text, S samples have at most 2/S of the variance of two, within 10 % (Hoeffding 1948)."""
    variances = {}
    for num_samples in (2, 8):
        report = repeated(WorldPredictor(MARKOV, chunk_size), CHAIN[0, :16], 3000, num_samples=num_samples, boundary_every=8)
        variances[num_samples] = report.scores.total.var(0)
    assert (variances[8] <= 1.1 * (2 / 8) * variances[2]).all(), variances[8] / variances[2]


@pytest.mark.parametrize("chunk_size", [1, 2, 4])
def test_a_collapsed_model_reads_zero(chunk_size):
    report = evaluate(WorldPredictor(MARKOV, chunk_size, collapsed=True), CHAIN, 4)
    assert (report.brier_lm.estimate, report.brier_lm.low, report.brier_lm.high) == (0, 0, 0)
    assert report.brier_n[3].estimate < -50


def test_the_score_of_the_true_law_is_the_ceiling():
    """2 Q(y) - sum Q^2 is sum Q^2 on average over y: no expectation is higher, and none of a wrong law as high."""
    truth, wrong = (truth_of(law, CHAIN, 4) for law in (MARKOV, WRONG))
    for order, ceiling in enumerate(100 * MARKOV.ceilings()):
        assert truth.brier_n[order].low < ceiling * 1.1 and truth.brier_n[order].high > ceiling * 0.9
    assert (truth.scores.means > wrong.scores.means).all()
    assert truth.nats_per_token.estimate == pytest.approx(MARKOV.entropy_rate, rel=0.1)


def test_baselines_stand_at_the_same_boundaries():
    unigram, bigram = fit_ngrams(_Tokens(CHAIN.reshape(-1)), MARKOV.vocab_size)
    report = score_ngram(bigram, CHAIN, np.arange(len(CHAIN)), boundary_every=1)
    assert report.scores.count[0] == 20 and report.likelihood.count[0] == BLOCK - 1
    nearly = truth_of(MARKOV, CHAIN, 1)
    np.testing.assert_allclose(report.scores.means, nearly.scores.means, atol=0.05)
    assert report.scores.means[0] > score_ngram(unigram, CHAIN, np.arange(len(CHAIN)), boundary_every=1).scores.means[0]


@pytest.mark.parametrize(("chunk_size", "place"), [(1, 4), (3, 5)])
def test_inner_products_and_drawn_tokens_have_one_mean_on_a_real_model(chunk_size, place):
    """Chunks shorter than four tokens: each sample's branch of the backbone goes on along its own tokens."""
    predictor, block = next_vector(chunk_size), np.random.default_rng(0).integers(0, 6, place + 4)
    options = dict(num_samples=4, decoding="drawn", with_energy=False, begin_id=0, boundary_every=place)
    products = repeated(predictor, block, 600, **options).scores.total
    tokens = by_hand(predictor, block, place=place, draws=600)
    assert (products.std(0) < 1.1 * tokens.std(0)).all()  # an expectation has less variance; 1.1: it is estimated
    agree(products, tokens)


@pytest.mark.parametrize(("window", "recall"), [(1, 0), (4, 0), (1, 3)])
def test_branches_go_on_with_their_own_tokens_before_them(window, recall):
    """A decoder inside the chunk whose window is narrower or wider than a chunk."""
    block = np.random.default_rng(0).integers(0, 6, 10)
    sizes = dict(dim=16, inner_dim=16, num_layers=1, table_dim=8)
    predictor = next_vector(2, ContextDecoderConfig(**sizes, window=window, recall=recall))
    options = dict(num_samples=4, decoding="drawn", with_energy=False, begin_id=0, boundary_every=5)
    agree(repeated(predictor, block, 600, **options).scores.total, by_hand(predictor, block, place=5, draws=600))


def agree(found, expected):
    """Two estimates of one mean from 600 draws each."""
    error = np.sqrt(found.var(0) + expected.var(0)) / np.sqrt(600)
    assert (abs(found.mean(0) - expected.mean(0)) < 3.5 * error).all(), (found.mean(0), expected.mean(0), error)


def test_a_real_token_model_by_its_probabilities_is_the_one_that_is_sampled():
    backbone = BackboneConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=16)
    model = TokenLMConfig(vocab_size=6, backbone=backbone, init_std=0.7).build(rngs=nnx.Rngs(0))
    block = np.random.default_rng(0).integers(0, 6, 8)
    known = repeated(model, block, 200, num_samples=4).scores.total
    sampled = by_hand(model, block, place=4, draws=600)
    assert known.std(0)[0] < 1e-6
    assert (abs(known.mean(0) - sampled.mean(0)) < 3.5 * sampled.std(0) / np.sqrt(600)).all()


def next_vector(chunk_size, context_decoder=None):
    sizes = dict(vocab_size=6, chunk_size=chunk_size, latent_dim=4)
    autoencoder = AutoencoderConfig(**sizes, dim=16, inner_dim=16, embedding_std=1.0).build(rngs=nnx.Rngs(0))
    backbone = BackboneConfig(dim=16, num_layers=1, num_heads=2, num_kv_heads=1, inner_dim=16)
    head = EnergyHeadConfig(num_blocks=1, noise_dim=4)
    config = LatentLMConfig(**sizes, backbone=backbone, head=head, context_decoder=context_decoder)
    lm = config.build(rngs=nnx.Rngs(1))
    if context_decoder is not None:
        lm.context_decoder.embedding[...] *= 4.0  # a law that is far from uniform
    lm.head.out.kernel[...] = jax.random.normal(jax.random.key(2), lm.head.out.kernel[...].shape)
    return NextVector(autoencoder, lm)


def by_hand(predictor, block, place, draws, num_samples=4):
    """Drawn tokens, each continuation read from the start of the block as a sequence of its own."""
    size = predictor.chunk_size
    fill = -place % size

    @jax.jit
    def written(key, texts):
        while texts.shape[1] * size < place + fill + 4:
            hidden, _ = predictor.hidden(texts)
            noise = predictor.draw_noise(stream(key, "by hand", texts.shape[1]), (1, len(texts)), "drawn")
            previous = recent_tokens(texts, predictor.reach)[:, -1]
            chunk = predictor.write(hidden[:, -1], previous, noise, decoding="drawn")[0]
            texts = jnp.concatenate([texts, chunk[:, None]], axis=1)
        return texts.reshape(draws, num_samples, -1)[..., place + fill : place + fill + 4]

    start = np.concatenate([np.zeros(fill, int), block[:place]]).reshape(1, -1, size)
    tokens = written(KEY, jnp.asarray(np.tile(start, (draws * num_samples, 1, 1))))
    target = jnp.asarray(np.tile(block[place : place + 4], (draws, 1)))
    return np.asarray(brier_argmax(jnp.moveaxis(tokens, 1, 0), target), np.float64)


def test_bad_use_is_named():
    predictor = WorldPredictor(MARKOV, 4)
    with pytest.raises(UsageError, match="begin_id is needed"):
        evaluate_predictor(predictor, CHAIN, np.arange(len(CHAIN)), KEY, boundary_every=2)
    with pytest.raises(UsageError, match="hold no boundary"):
        evaluate_predictor(predictor, CHAIN, np.arange(len(CHAIN)), KEY, boundary_every=24)
    with pytest.raises(UsageError, match="decoding must be"):
        evaluate_predictor(predictor, CHAIN, np.arange(len(CHAIN)), KEY, decoding="exact")
    with pytest.raises(UsageError, match="text that it never writes"):
        truth_of(WORLD, np.zeros((2, 8), int), 4)


class _Tokens:
    def __init__(self, tokens):
        self.tokens, self.num_tokens = tokens, len(tokens)

    def read(self, start, length):
        return self.tokens[start : start + length]
