"""Both models are scored on every chunk as their own evaluations score them; a router finds a gap that is there to be found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.brier_lm import TextProtocol
from calm.core.chunk_decoder import recent_tokens
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector
from calm.core.transformer import TransformerConfig
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.dual.router import ChunkScores, RouterTraining, measure_routing, score_chunks, thresholds, train_router
from calm.errors import UsageError
from calm.evaluate.brier import evaluate_predictor
from calm.token.model import TokenLMConfig
from random_models import random_model

V, K, DIM = 6, 3, 8
BACKBONE = TransformerConfig(dim=DIM, num_layers=1, num_heads=2, num_kv_heads=2, inner_dim=8)
TEXT = TextProtocol(dataset="planted", sha256="-", split="valid", tokenizer="-", block_tokens=24, chunk_size=K)


def test_chunks_are_scored_as_each_model_is_scored_alone():
    """Nats of CALM without a latent are exact; Brier-1 of a token model is exact, whatever was drawn."""
    codec = random_model(AutoencoderConfig(vocab_size=V, chunk_size=K, latent_dim=4, dim=6, inner_dim=8), seed=1)
    sizes = dict(vocab_size=V, chunk_size=K, latent_dim=4, backbone=BACKBONE, head=EnergyHeadConfig(num_blocks=1, noise_dim=4))
    writer = ContextDecoderConfig(dim=8, inner_dim=8, num_layers=1, table_dim=6, window=2, use_latent=False)
    predictor = NextVector(codec, random_model(LatentLMConfig(**sizes, context_decoder=writer), seed=2))
    token_lm = random_model(TokenLMConfig(vocab_size=V, backbone=BACKBONE), seed=3)
    blocks = np.random.default_rng(0).integers(0, V, (4, 24)).astype(np.int32)
    scores = score_chunks(token_lm, predictor, blocks, jax.random.key(0), num_samples=4)
    assert scores.hidden.shape == (4, 6, DIM) and scores.brier.shape == (2, 4, 6, 4)

    @nnx.jit
    def nats(token_lm, predictor, blocks):
        """Of every token but the first, by the token model; of chunks 1..6, by CALM."""
        chunks = blocks.reshape(4, -1, K)
        hidden, previous = predictor.hidden(chunks)[0][:, :6], recent_tokens(chunks, predictor.reach)[:, :6]
        log_probs = predictor.token_log_probs(hidden, previous, jnp.zeros((1, 4, 6, 4)), chunks[:, 1:7])[0]
        return token_lm.nats_and_match(token_lm.hidden(blocks[..., None])[0][:, :-1], blocks[:, 1:])[0], -log_probs.sum(-1)

    of_tokens, of_chunks = nats(token_lm, predictor, jnp.asarray(blocks))
    np.testing.assert_allclose(scores.nats[0], of_chunks, rtol=1e-4)
    np.testing.assert_allclose(scores.nats[1], of_tokens[:, 2 : 2 + 6 * K].reshape(4, 6, K).sum(-1), rtol=1e-4)
    report = evaluate_predictor(token_lm, blocks, np.arange(4), jax.random.key(1), num_samples=4, boundary_every=K)
    np.testing.assert_allclose(scores.brier[1, ..., 0].sum(1), report.scores.total[:, 0], rtol=1e-4)
    np.testing.assert_allclose(scores.gap("nats"), (scores.nats[0] - scores.nats[1]) / K)
    np.testing.assert_allclose(scores.gap("brier"), (scores.brier[1] - scores.brier[0]).mean(-1))


def planted(rows: int, seed: int) -> ChunkScores:
    """The gap is a smooth function of two coordinates of the hidden state, and noise that none can foretell."""
    draw = np.random.default_rng(seed)
    hidden = draw.standard_normal((rows, 7, DIM)).astype(np.float32)
    gap = 3 * (np.tanh(hidden[..., 0]) + 0.5 * hidden[..., 1] - 0.4 + 0.5 * draw.standard_normal((rows, 7)))
    token = 9 + draw.random((rows, 7))
    brier = 0.1 + draw.random((2, rows, 7, 4)) * np.array([0.3, 0.1, 0.05, 0.02])
    brier[1] += 0.03 * gap[..., None]
    return ChunkScores(hidden=hidden, nats=np.stack([K * (token + gap), K * token]), brier=brier, chunk_size=K)


@pytest.fixture(scope="module")
def found():
    fit, held = planted(150, 0), planted(150, 1)
    router = train_router(fit, jax.random.key(0), RouterTraining(inner_dim=16, steps=300, learning_rate=0.01))
    at = thresholds(router, fit)
    report = measure_routing(router, held, np.arange(150), at, costs=(1e6, 3e6), text=TEXT)
    return held, router, at, report


def test_a_router_finds_the_gap_on_text_that_it_has_not_seen(found):
    """The correlation is nearly the most that the noise allows, shares are met, and scores lie between coin and oracle."""
    held, router, _, report = found
    gap = held.gap("nats")
    predicted = np.asarray(router(jnp.asarray(held.hidden)))
    knowable = np.corrcoef((np.tanh(held.hidden[..., 0]) + 0.5 * held.hidden[..., 1]).ravel(), gap.ravel())[0, 1]
    assert report.correlation > 0.95 * knowable
    assert abs(predicted.mean() - gap.mean()) < 0.3 and abs(predicted.std() / gap.std() - knowable) < 0.15  # in its own units
    for point in report.points[1:-1]:
        assert abs(point.share - point.asked) < 0.08
        assert point.oracle_nats < point.nats.estimate < point.coin_nats
        assert point.gain.low > 0 and np.isclose(point.gain.estimate, point.coin_nats - point.nats.estimate)


def test_the_ends_are_the_models_themselves_and_the_coin_lies_on_the_line_between(found):
    held, _, at, report = found
    first, last = report.points[0], report.points[-1]
    assert (at[0.0], at[1.0]) == (float("inf"), float("-inf")) and (first.share, last.share) == (0.0, 1.0)
    for point, model in ((first, 0), (last, 1)):
        assert np.isclose(point.nats.estimate, held.nats[model].mean() / K)
        assert np.isclose(point.brier_lm.estimate, 100 * np.prod(held.brier[model].reshape(-1, 4).mean(0)) ** 0.25)
        assert np.isclose(point.nats.estimate, point.oracle_nats) and np.isclose(point.gain.estimate, 0)
    for point in report.points:
        line = (1 - point.share) * first.nats.estimate + point.share * last.nats.estimate
        assert np.isclose(point.coin_nats, line)
        assert np.isclose(point.flops, 1e6 + 2e6 * point.share) and np.isclose(point.steps, 1 / K + point.share)


def test_the_best_score_can_lie_between_the_two_models(found):
    """Each model is better somewhere, so a router passes both."""
    report = found[3]
    best = min(point.nats.estimate for point in report.points)
    assert best < min(report.points[0].nats.estimate, report.points[-1].nats.estimate) - 0.1
    assert "correlation of the foretold and the true gap in nats" in report.table()
    assert report.to_dict()["points"][3]["nats"]["estimate"] == report.points[3].nats.estimate


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RouterTraining(measure="luck"), "measure must be nats or brier"),
        (lambda: RouterTraining(steps=0), "must be at least 1"),
        (lambda: RouterTraining(held_back=1.0), "held_back must lie between 0 and 1"),
        (lambda: train_router(planted(1, 0), jax.random.key(0)), "needs at least two blocks"),
        (lambda: planted(2, 0).gap("luck"), "measure must be nats or brier"),
    ],
)
def test_bad_settings_are_one_line(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_shares_lie_between_nothing_and_all(found):
    with pytest.raises(UsageError, match="shares must lie between 0 and 1"):
        thresholds(found[1], found[0], (0.5, 1.5))
