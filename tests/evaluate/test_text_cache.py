"""The cache: equal to counting the history with loops, a proper distribution, draws that follow it."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import UsageError
from calm.evaluate import text_cache
from calm.evaluate.history import NO_TOKEN, HistoryModel, histories, log_prob, sample
from calm.evaluate.kneser_ney import KneserNey
from calm.evaluate.ngram_counts import count_ngrams
from calm.evaluate.text_cache import LONGEST, Cached, CacheWeights, fit_cache

VOCABULARY = 4
WEIGHTS = CacheWeights(share=0.3, tokens=5.0, matches=(2.0, 1.5, 1.0, 0.5))


@dataclasses.dataclass
class ArraySplit:
    tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length].astype(np.int32)


def base(order: int = 3, vocab: int = VOCABULARY) -> KneserNey:
    tokens = np.random.default_rng(0).choice(vocab, size=200, p=[0.4, 0.3, 0.2, 0.1] if vocab == 4 else None)
    return KneserNey.closed_form(count_ngrams(ArraySplit(tokens), vocab), order)


def plain_probability(model: Cached, history: list[int], token: int) -> float:
    """The definition, by loops over the history."""
    p = float(model.base.conditional(np.array([history], int).reshape(1, -1), np.array([token]))[0])
    weights = model.weights
    if history:
        weight = weights.share * len(history) / (len(history) + weights.tokens)
        p = weight * history.count(token) / len(history) + (1 - weight) * p
    for m in range(1, LONGEST + 1):
        after = [history[i] for i in range(m, len(history)) if history[i - m : i] == history[len(history) - m :]]
        if after:
            weight = len(after) / (len(after) + weights.matches[m - 1] * len(set(after)))
            p = weight * after.count(token) / len(after) + (1 - weight) * p
    return p


histories_of_text = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)


@given(st.lists(histories_of_text, min_size=1, max_size=4), st.integers(0, VOCABULARY - 1), st.integers(0, 2))
def test_equal_to_the_definition_with_loops(rows, token, filled):
    model = Cached(base(), WEIGHTS)
    width = max(map(len, rows)) + filled
    context = np.array([[*[NO_TOKEN] * (width - len(row)), *row] for row in rows], int)
    found = model.conditional(context, np.full(len(rows), token))
    np.testing.assert_allclose(found, [plain_probability(model, row, token) for row in rows], rtol=1e-9)


@given(histories_of_text, st.integers(1, 5))
def test_every_history_has_a_distribution_over_the_whole_vocabulary(history, order):
    model = Cached(base(order), WEIGHTS)
    rows = np.repeat(np.array(history, int)[None], VOCABULARY, axis=0)
    p = model.conditional(rows, np.arange(VOCABULARY))
    assert (p > 0).all()
    assert p.sum() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    "history", [[], [2], [0, 1, 2, 3, 3, 0, 1, 2, 0, 1, 2], [1, 1, 1, 1, 1, 1], [NO_TOKEN, NO_TOKEN, 3, 2, 3]]
)
def test_draws_follow_the_conditional(history):
    model, draws = Cached(base(), WEIGHTS), 20_000
    rows = np.repeat(np.array([history], int), draws, axis=0)
    token, probability = model.draw_with_probability(rows, np.random.default_rng(1))
    np.testing.assert_allclose(probability, model.conditional(rows, token), rtol=1e-12)
    expected = draws * model.conditional(rows[:VOCABULARY], np.arange(VOCABULARY))
    chi_square = ((np.bincount(token, minlength=VOCABULARY) - expected) ** 2 / expected).sum()
    assert chi_square < 21.1  # 1 in 10,000 with three degrees of freedom


def test_rows_of_different_histories_do_not_mix():
    """Draws in one call come from each row's own matches."""
    model = Cached(base(), CacheWeights(share=0.0, tokens=1.0, matches=(1e-9,) * LONGEST))  # copies wherever it can
    context = np.array(
        [[0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3], [1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]]
    )
    for seed in range(20):
        assert model.draw(context, np.random.default_rng(seed)).tolist() == [2, 3, 0]


def test_pieces_change_nothing(monkeypatch):
    model = Cached(base(), WEIGHTS)
    context = np.random.default_rng(2).integers(0, VOCABULARY, (50, 20))
    token = context[:, 0].copy()
    whole = model.conditional(context, token)
    monkeypatch.setattr(text_cache, "ENTRIES_AT_ONCE", 60)
    np.testing.assert_array_equal(model.conditional(context, token), whole)
    assert model.draw(context, np.random.default_rng(0)).shape == (50,)


def test_the_future_is_not_read_and_the_past_is():
    model = Cached(base(), WEIGHTS)
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (2, 40))
    found = log_prob(model, tokens[:, :8], tokens[:, 8:])
    for row, n in np.ndindex(found.shape):
        assert found[row, n] == pytest.approx(
            np.log(plain_probability(model, tokens[row, : 8 + n].tolist(), tokens[row, 8 + n]))
        )
    changed = tokens.copy()
    changed[:, 30:] = (changed[:, 30:] + 1) % VOCABULARY
    np.testing.assert_array_equal(log_prob(model, changed[:, :8], changed[:, 8:])[:, :22], found[:, :22])
    other_past = tokens[:, :8][:, ::-1]
    assert (log_prob(model, other_past, tokens[:, 8:]) != found).any()


def test_samples_are_part_of_their_own_history():
    model = Cached(base(1), CacheWeights(share=0.0, tokens=1.0, matches=(1e-9,) * LONGEST))
    tokens = sample(model, np.array([[0, 1, 2, 3, 0]]), num_tokens=12, num_samples=3, seed=0)
    np.testing.assert_array_equal(tokens, np.broadcast_to(np.arange(1, 13) % 4, (3, 1, 12)))


def test_fitting_finds_weights_of_text_that_repeats_itself():
    vocab = 40
    generator, model = np.random.default_rng(4), base(2, vocab)
    phrases = generator.integers(0, vocab, (6, 4, 5))  # every block repeats four phrases of its own
    blocks = np.stack([phrases[b, generator.integers(0, 4, 16)].reshape(-1) for b in range(6)])
    places = np.arange(1, blocks.shape[1])
    rows = histories(blocks, places, None)
    context, token = rows.reshape(-1, rows.shape[-1]), blocks[:, places].reshape(-1)
    fitted = fit_cache(model, context, token)
    plain, default, best = (-np.log(m.conditional(context, token)).mean() for m in (model, Cached(model), fitted))
    assert best < default - 0.1 < plain - 1
    assert min(fitted.weights.matches) < min(CacheWeights().matches)  # a match says nearly all here


def test_both_are_history_models():
    assert isinstance(base(), HistoryModel) and isinstance(Cached(base()), HistoryModel)


def test_bad_input_is_named():
    model = Cached(base())
    with pytest.raises(UsageError, match="token ids run from 4 to 4, the vocabulary has 4"):
        model.conditional(np.zeros((1, 3), int), np.array([4]))
    with pytest.raises(UsageError, match="context ids run from 0 to 9"):
        model.draw(np.array([[0, 9]]), np.random.default_rng(0))
    with pytest.raises(UsageError, match="needs held-out tokens"):
        fit_cache(base(), np.zeros((0, 3), int), np.zeros(0, int))
    for wrong in ({"share": 1.0}, {"tokens": 0.0}, {"matches": (1.0,)}, {"matches": (1.0, 1.0, 0.0, 1.0)}):
        with pytest.raises(UsageError, match="cache weights"):
            CacheWeights(**wrong)
