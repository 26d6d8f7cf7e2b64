"""BrierLM: unbiased on a world whose conditionals are known, tighter than two samples, floored, exact where it can
be.
"""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.brier_lm import (
    Before,
    Protocol,
    brier_argmax,
    brier_drawn,
    brier_drawn_from_latents,
    brier_intervals,
    brier_known,
    brier_lm,
    compare_brier,
    published_two_sample,
)
from calm.core.intervals import BlockSums
from calm.errors import UsageError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "brier"

# A Markov world of three tokens: START holds the law after the boundary, STEP the transitions.
START = np.array([0.6, 0.3, 0.1])
STEP = np.array([[0.1, 0.8, 0.1], [0.5, 0.25, 0.25], [0.05, 0.05, 0.9]])
OTHER = np.array([[0.4, 0.3, 0.3], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]])


def walk(step: np.ndarray, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Chunks of four tokens of the chain, `[*shape 4]`."""
    generator = np.random.default_rng(seed)
    tokens = [generator.choice(3, size=shape, p=START)]
    for _ in range(3):
        cumulative = np.cumsum(step[tokens[-1]], -1)
        tokens.append((generator.random((*shape, 1)) > cumulative).sum(-1).clip(max=2))
    return np.stack(tokens, -1)


def law(step: np.ndarray, order: int) -> np.ndarray:
    """Probabilities of every n-gram, in the order of itertools.product."""
    grams = itertools.product(range(3), repeat=order)
    return np.array([START[gram[0]] * np.prod([step[a, b] for a, b in itertools.pairwise(gram)]) for gram in grams])


def block_sums(scores: np.ndarray, block_tokens: int = 1024) -> BlockSums:
    """Scores `[R P O]` of R blocks, each its own document."""
    return BlockSums(
        total=np.asarray(scores, np.float64).sum(1),
        count=np.full(len(scores), float(scores.shape[1])),
        document=np.arange(len(scores)),
        block_tokens=block_tokens,
    )


@pytest.mark.parametrize("num_samples", [2, 8])
def test_unbiased_in_a_known_world(num_samples):
    positions = 20_000
    tokens, targets = walk(OTHER, (num_samples, positions), 0), walk(STEP, (positions,), 1)
    scores = np.asarray(brier_argmax(jnp.asarray(tokens), jnp.asarray(targets)))
    for order in range(1, 5):
        p, q = law(OTHER, order), law(STEP, order)
        truth, estimate = 2 * p @ q - p @ p, scores[:, order - 1]
        assert abs(estimate.mean() - truth) < 3 * estimate.std() / np.sqrt(positions)


def test_all_samples_have_less_variance_than_two():
    tokens, targets = walk(STEP, (8, 4000), 2), walk(STEP, (4000,), 3)
    every, two = (np.asarray(brier_argmax(jnp.asarray(part), jnp.asarray(targets))) for part in (tokens, tokens[:2]))
    assert (every.var(0) < 0.75 * two.var(0)).all()


def test_a_perfect_model_scores_the_sum_of_squared_probabilities():
    sums = block_sums(np.asarray(brier_argmax(jnp.asarray(walk(STEP, (8, 60, 200), 4)), jnp.asarray(walk(STEP, (60, 200), 5)))))
    result = brier_intervals(sums, level=0.999)
    truth = np.array([np.sum(law(STEP, order) ** 2) for order in range(1, 5)])
    for order in range(4):
        assert result.brier_n[order].low < 100 * truth[order] < result.brier_n[order].high
    assert result.brier_lm.low < 100 * np.prod(truth) ** 0.25 < result.brier_lm.high


def test_a_collapsed_model_reads_zero_where_the_published_form_reads_one():
    tokens, targets = jnp.zeros((8, 40, 4), jnp.int32), jnp.ones((40, 4), jnp.int32)
    scores = brier_argmax(tokens, targets)
    np.testing.assert_array_equal(scores, -1)
    result = brier_intervals(block_sums(np.asarray(scores).reshape(4, 10, 4)))
    assert (result.brier_lm.estimate, result.brier_lm.low, result.brier_lm.high) == (0, 0, 0)
    assert float(published_two_sample(tokens, targets).brier_lm) == 1


def test_each_order_is_floored_before_the_product():
    means = np.array([[0.5, 0.4, -0.1, -0.1], [0.16, 0.16, 0.16, 0.16]])
    np.testing.assert_allclose(brier_lm(means), [0, 16])


def test_the_published_two_sample_form_matches_the_published_code_exactly():
    golden = np.load(GOLDEN / "two_sample_k4.npz")
    result = published_two_sample(jnp.asarray(golden["sampled_tokens"]), jnp.asarray(golden["targets"]))
    np.testing.assert_array_equal(np.asarray(result.brier_n, np.float64), golden["brier"])


def test_argmax_equals_the_double_sum_written_out():
    tokens, targets = walk(OTHER, (5, 7), 6), walk(STEP, (7,), 7)
    scores = brier_argmax(jnp.asarray(tokens), jnp.asarray(targets))
    for position in range(7):
        for order in range(1, 5):
            grams, target = [tuple(row[:order]) for row in tokens[:, position]], tuple(targets[position, :order])
            pairs = sum(a == b for i, a in enumerate(grams) for j, b in enumerate(grams) if i != j)
            assert scores[position, order - 1] == pytest.approx(2 / 5 * grams.count(target) - pairs / 20, abs=1e-6)


def test_drawn_equals_the_expectation_over_enumerated_tokens():
    samples, chunk, vocabulary = 3, 2, 3
    logits = jax.random.normal(jax.random.key(0), (samples, 2, chunk, vocabulary)) * 2
    targets = jnp.array([[0, 2], [1, 1]])
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    every = np.array(list(itertools.product(range(vocabulary), repeat=samples * chunk))).reshape(-1, samples, 1, chunk)
    drawn = every.repeat(2, 2)  # [draws S positions K]: both positions take every value
    chance = np.prod(np.take_along_axis(probabilities[None], drawn[..., None], -1), axis=(1, 3, 4))
    scores = np.asarray(brier_argmax(jnp.asarray(drawn.swapaxes(0, 1)), jnp.broadcast_to(targets, (len(drawn), 2, chunk))))
    expected = (chance[..., None] * scores).sum(0)
    np.testing.assert_allclose(brier_drawn(logits, targets), expected, atol=1e-5)


def test_drawn_becomes_argmax_when_the_decoder_is_certain():
    logits = 50 * jax.nn.one_hot(jnp.asarray(walk(OTHER, (4, 30), 1)), 3)
    targets = jnp.asarray(walk(STEP, (30,), 8))
    np.testing.assert_allclose(brier_drawn(logits, targets), brier_argmax(jnp.argmax(logits, -1), targets), atol=1e-5)


@pytest.mark.parametrize("max_floats", [1, 400, 10**9])
def test_drawn_in_pieces_is_drawn_at_once(max_floats):
    table = jax.random.normal(jax.random.key(2), (6, 4 * 5))
    logits_of = lambda latents: (latents @ table).reshape(*latents.shape[:-1], 4, 5)  # noqa: E731
    latents = jax.random.normal(jax.random.key(3), (3, 2, 7, 6))
    targets = jax.random.randint(jax.random.key(4), (2, 7, 4), 0, 5)
    whole = brier_drawn(logits_of(latents), targets)
    np.testing.assert_allclose(brier_drawn_from_latents(logits_of, latents, targets, max_floats=max_floats), whole, atol=1e-6)


def test_a_later_chunk_counts_where_what_came_before_matches():
    """Orders 3 and 4 of chunks of two tokens: the first chunk as drawn, the second in expectation over its law."""
    tokens, targets = walk(OTHER, (5, 40), 9), walk(STEP, (40,), 10)
    certain = 60 * jax.nn.one_hot(jnp.asarray(tokens[..., 2:]), 3)
    before = Before(jnp.asarray(tokens[..., :2]), jnp.asarray(targets[..., :2]))
    whole = brier_argmax(jnp.asarray(tokens), jnp.asarray(targets))
    np.testing.assert_allclose(brier_drawn(certain, jnp.asarray(targets[..., 2:]), before), whole[:, 2:], atol=1e-5)


def test_known_probabilities_along_the_squared_law_give_the_exact_score():
    """E over x ~ p^2 / Z of the product of Z is sum P^2: here every path is taken, weighted by its probability."""
    target = walk(STEP, (), 11)
    laws = [START, *(STEP[token] for token in target[:-1])]
    log_probs = np.log([law_[token] for law_, token in zip(laws, target, strict=True)])
    match = {token: np.sum(STEP[token] ** 2) for token in range(3)}
    first = np.sum(START**2)
    scores = np.zeros(4)
    for path in itertools.product(range(3), repeat=3):
        rows = [START, STEP[path[0]], STEP[path[1]]]
        chance = np.prod([row[token] ** 2 / np.sum(row**2) for row, token in zip(rows, path, strict=True)])
        matches = np.array([[first, *(match[token] for token in path)]])
        scores += chance * np.asarray(brier_known(jnp.asarray(log_probs), jnp.asarray(matches)))
    exact = [2 * np.exp(log_probs[: n + 1].sum()) - np.sum(law(STEP, n + 1) ** 2) for n in range(4)]
    np.testing.assert_allclose(scores, exact, atol=1e-6)


def test_long_chunks_score_their_first_four_tokens():
    tokens, targets = walk(OTHER, (4, 9), 11), walk(STEP, (9,), 12)
    long = brier_argmax(jnp.asarray(np.concatenate([tokens] * 2, -1)), jnp.asarray(np.concatenate([targets] * 2, -1)))
    np.testing.assert_array_equal(long, brier_argmax(jnp.asarray(tokens), jnp.asarray(targets)))


def test_pairing_sees_a_difference_that_separate_intervals_do_not():
    targets = walk(STEP, (60, 20), 13)
    good = block_sums(np.asarray(brier_argmax(jnp.asarray(walk(STEP, (8, 60, 20), 14)), jnp.asarray(targets))))
    worse = BlockSums(total=good.total - 0.02 * 20, count=good.count, document=good.document, block_tokens=1024)
    difference = compare_brier(good, worse)
    assert difference.brier_n[0].estimate == pytest.approx(2) and difference.brier_n[0].excludes_zero
    assert brier_intervals(worse).brier_n[0].high > brier_intervals(good).brier_n[0].low
    assert not compare_brier(good, good).brier_lm.excludes_zero


def test_bad_use_is_named():
    with pytest.raises(UsageError, match="at least 2"):
        brier_argmax(jnp.zeros((1, 3, 4), jnp.int32), jnp.zeros((3, 4), jnp.int32))
    with pytest.raises(UsageError, match="at least 4 tokens"):
        published_two_sample(jnp.zeros((2, 3, 2), jnp.int32), jnp.zeros((3, 2), jnp.int32))
    settings = dict(dataset="d", sha256="0" * 64, split="valid", tokenizer="f", chunk_size=4, num_samples=8)
    protocol = Protocol(**settings, block_tokens=256, decoding="argmax")
    with pytest.raises(UsageError, match="block_tokens is 256"):
        protocol.require_comparable(Protocol(**settings, block_tokens=512, decoding="drawn"))
    protocol.require_comparable(Protocol(**{**settings, "chunk_size": 2}, block_tokens=256, decoding="drawn"))
    with pytest.raises(UsageError, match="boundary_every is 4 on one side and 1"):
        protocol.require_comparable(Protocol(**settings, block_tokens=256, decoding="argmax", boundary_every=1))
    with pytest.raises(UsageError, match="4, got 2 orders"):
        brier_intervals(block_sums(np.zeros((3, 4, 2))))
    with pytest.raises(UsageError, match="multiple of chunk_size"):
        Protocol(**settings, block_tokens=255, decoding="argmax")
