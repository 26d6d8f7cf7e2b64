"""Kneser-Ney models: equal to counting with dictionaries, proper distributions, draws that follow them."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.errors import UsageError
from calm.evaluate.history import NO_TOKEN, histories, log_prob, sample
from calm.evaluate.kneser_ney import KneserNey, closed_form_discounts, fit_discounts
from calm.evaluate.ngram_counts import count_ngrams

VOCABULARY = 4


@dataclasses.dataclass
class ArraySplit:
    tokens: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, length: int) -> np.ndarray:
        return self.tokens[start : start + length].astype(np.int32)


def chain(size: int, seed: int = 0, vocab: int = VOCABULARY) -> np.ndarray:
    """Text in which a token depends on the two before it; the last id never occurs."""
    generator, tokens = np.random.default_rng(seed), [0, 1]
    for _ in range(size - 2):
        likely = (tokens[-1] + 2 * tokens[-2]) % (vocab - 1)
        tokens.append(likely if generator.random() < 0.7 else int(generator.integers(vocab - 1)))
    return np.array(tokens)


def counted(tokens, **options):
    return count_ngrams(ArraySplit(np.asarray(tokens)), VOCABULARY, **options)


def plain_probability(tokens: list[int], vocab_size: int, discounts: np.ndarray, context: tuple[int, ...], token: int) -> float:
    """The definition, with a dictionary of the tokens seen before every n-gram; "start" comes before the first."""
    order = min(len(discounts), len(tokens))

    def count(gram: tuple[int, ...]) -> int:
        at = [i for i in range(len(tokens) - len(gram) + 1) if tuple(tokens[i : i + len(gram)]) == gram]
        return len(at) if len(gram) == order else len({tokens[i - 1] if i else "start" for i in at})

    def probability(context: tuple[int, ...]) -> float:
        below = probability(context[1:]) if context else 1 / vocab_size
        row = {y: count((*context, y)) for y in range(vocab_size)}
        total = sum(row.values())
        if not total:
            return below
        discount = {y: float(discounts[len(context)][min(c, 3) - 1]) if c else 0.0 for y, c in row.items()}
        return (row[token] - discount[token]) / total + sum(discount.values()) / total * below

    known = context[max((i + 1 for i, x in enumerate(context) if x == NO_TOKEN), default=0) :]
    return probability(known[len(known) - min(order - 1, len(known)) :])


texts = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40)
orders = st.integers(1, 5)


@st.composite
def contexts(draw) -> tuple[int, ...]:
    known = draw(st.lists(st.integers(0, VOCABULARY - 1), max_size=5))
    return (*[NO_TOKEN] * draw(st.integers(0, 2)), *known)


@given(texts, orders, contexts(), st.integers(0, VOCABULARY - 1))
def test_equal_to_the_definition_with_dictionaries(tokens, order, context, token):
    model = KneserNey.closed_form(counted(tokens), order)
    expected = plain_probability(tokens, VOCABULARY, model.discounts, context, token)
    found = model.conditional(np.array(context, int).reshape(1, -1), np.array([token]))[0]
    assert found == pytest.approx(expected, rel=1e-9)


@given(texts, orders, contexts())
def test_every_context_has_a_distribution_over_the_whole_vocabulary(tokens, order, context):
    model = KneserNey.closed_form(counted(tokens), order)
    rows = np.repeat(np.array(context, int)[None], VOCABULARY, axis=0)
    p = model.conditional(rows, np.arange(VOCABULARY))
    assert (p > 0).all()
    assert p.sum() == pytest.approx(1, rel=1e-12)


def test_what_fills_a_short_context_is_no_token():
    model = KneserNey.closed_form(counted(np.random.default_rng(0).integers(0, VOCABULARY, 150)), 5)
    for length in range(4):
        rows = np.array(list(itertools.product(range(VOCABULARY), repeat=length)), int)
        filled = np.concatenate([np.full((len(rows), 4 - length), NO_TOKEN), rows], axis=1)
        for y in range(VOCABULARY):
            token = np.full(len(rows), y)
            np.testing.assert_array_equal(model.conditional(filled, token), model.conditional(rows, token))


@given(texts)
def test_lower_orders_are_counted_alike_however_many_are_counted(tokens):
    for order in range(1, 6):
        from_all, alone = (KneserNey.closed_form(counted(tokens, max_order=n), order) for n in (5, order))
        rows, y = np.array(list(itertools.product(range(VOCABULARY), repeat=4))), np.zeros(VOCABULARY**4, int)
        np.testing.assert_allclose(from_all.conditional(rows, y), alone.conditional(rows, y), rtol=1e-12)


def test_continuation_counts_by_hand():
    # "0 1" occurs three times, always after 3 or at the start; "1" alone follows only 0, so one token comes before it.
    counts = counted([0, 1, 3, 0, 1, 3, 0, 1])
    unigrams, bigrams = counts.levels[0], counts.levels[1]
    assert dict(zip(unigrams.codes.tolist(), unigrams.counts.tolist(), strict=True)) == {0: 3, 1: 3, 3: 2}
    assert dict(zip(unigrams.codes.tolist(), unigrams.continuations.tolist(), strict=True)) == {0: 2, 1: 1, 3: 1}
    place = np.flatnonzero(bigrams.counts == 3)
    assert bigrams.continuations[place].tolist() == [2]  # the start and 3


def test_closed_form_discounts_by_hand():
    # n1..n4 = 4 2 2 1: Y = 4 / 8, D1 = 1 - 2 Y 2/4, D2 = 2 - 3 Y 2/2, D3+ = 3 - 4 Y 1/2
    counts = np.array([1, 1, 1, 1, 2, 2, 3, 3, 4, 9])
    np.testing.assert_allclose(closed_form_discounts(counts), [0.5, 0.5, 2.0])
    assert closed_form_discounts(np.array([7, 7])).tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_draws_follow_the_conditional(order):
    model, draws = KneserNey.closed_form(counted(chain(120)), order), 20_000
    for context in ([0, 1, 2, 0], [1, 1, 1, 1], [NO_TOKEN, NO_TOKEN, NO_TOKEN, 2], [3, 3, 3, 3], [NO_TOKEN] * 4):
        rows = np.repeat(np.array([context]), draws, axis=0)
        token, probability = model.draw_with_probability(rows, np.random.default_rng(order))
        np.testing.assert_array_equal(probability, model.conditional(rows, token))
        expected = draws * model.conditional(rows[:VOCABULARY], np.arange(VOCABULARY))
        chi_square = ((np.bincount(token, minlength=VOCABULARY) - expected) ** 2 / expected).sum()
        assert chi_square < 21.1  # 1 in 10,000 with three degrees of freedom
        np.testing.assert_array_equal(token, model.draw(rows, np.random.default_rng(order)))


def test_fitted_discounts_cost_fewer_nats_on_what_they_were_fitted_on():
    tokens = chain(3000)
    model = KneserNey.closed_form(counted(tokens[:600]), 4)
    held = tokens[None, 600:]
    places = np.arange(4, held.shape[1])
    context, token = histories(held, places, 4)[0], held[0, places]
    fitted = fit_discounts(model, context, token)
    before, after = (-np.log(each.conditional(context, token)).mean() for each in (model, fitted))
    assert after < before - 1e-3
    assert (fitted.discounts > 0).all() and (fitted.discounts <= [1, 2, 3]).all()
    nudged = (dataclasses.replace(fitted, discounts=np.clip(fitted.discounts * f, 0.02, [1, 2, 3])) for f in (0.9, 1.1))
    assert all(-np.log(each.conditional(context, token)).mean() > after for each in nudged)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_log_probability_is_that_of_the_chain_and_never_sees_the_future(order):
    model = KneserNey.closed_form(counted(chain(100)), order)
    context, tokens = np.array([[2, 0], [NO_TOKEN, 1]]), np.array([[1, 2, 0, 0, 1], [0, 3, 1, 1, 2]])
    found = log_prob(model, context, tokens)
    for row, n in np.ndindex(tokens.shape):
        before = np.concatenate([context[row], tokens[row, :n]])
        expected = np.log(model.conditional(before[None], tokens[row, n : n + 1]))[0]
        assert found[row, n] == pytest.approx(expected)
    changed = tokens.copy()
    changed[:, 3:] = 3
    np.testing.assert_array_equal(log_prob(model, context, changed)[:, :3], found[:, :3])


@pytest.mark.parametrize("reach", [None, 0, 1, 3, 20])
def test_a_history_is_the_tokens_before_a_place_and_no_others(reach):
    tokens, places = np.arange(24).reshape(2, 12), np.array([0, 2, 3, 7, 11])
    rows = histories(tokens, places, reach)
    for block, (number, place) in itertools.product(range(2), enumerate(places)):
        known = tokens[block, max(0, place - (12 if reach is None else reach)) : place]
        row = rows[block, number]
        assert row[len(row) - len(known) :].tolist() == known.tolist()
        assert (row[: len(row) - len(known)] == NO_TOKEN).all()


def test_samples_read_what_they_wrote():
    model = KneserNey.closed_form(counted([0, 1, 2, 3] * 200), 2)  # after x comes x + 1, almost always
    tokens = sample(model, np.array([[3], [1]]), num_tokens=6, num_samples=50, seed=0)
    assert tokens.shape == (50, 2, 6)
    before = np.concatenate([np.broadcast_to([[3], [1]], (50, 2, 1)), tokens[..., :-1]], axis=-1)
    assert (tokens == (before + 1) % 4).mean() > 0.97
    np.testing.assert_array_equal(tokens, sample(model, np.array([[3], [1]]), num_tokens=6, num_samples=50, seed=0))


def test_bad_input_is_named():
    counts = counted(chain(50), max_order=3)
    model = KneserNey.closed_form(counts, 3)
    for order in (0, 6, -1):
        with pytest.raises(UsageError, match=f"from 1 to 5, got {order}"):
            KneserNey.closed_form(counts, order)
        with pytest.raises(UsageError, match=f"from 1 to 5, got {order}"):
            counted(chain(50), max_order=order)
    with pytest.raises(UsageError, match="counted up to order 3"):
        KneserNey(counts, 4, np.full((4, 3), 0.5))
    with pytest.raises(UsageError, match="D1, D2, D3"):
        KneserNey(counts, 3, np.full((3, 3), 1.5))
    with pytest.raises(UsageError, match="at least one token"):
        counted(np.zeros(0, int))
    with pytest.raises(UsageError, match="token id 4, the vocabulary has 4"):
        counted([0, 4])
    with pytest.raises(UsageError, match="token ids run from 0 to 4, the vocabulary has 4"):
        model.conditional(np.zeros((2, 2), int), np.array([0, 4]))
    with pytest.raises(UsageError, match="context ids run from -2"):
        model.draw(np.full((2, 2), -2), np.random.default_rng(0))
    with pytest.raises(UsageError, match="needs held-out tokens"):
        fit_discounts(model, np.zeros((0, 2), int), np.zeros(0, int))
    with pytest.raises(UsageError, match="at least 1 token and 1 sample"):
        sample(model, np.zeros((1, 1), int), num_tokens=0, num_samples=1, seed=0)


def test_only_so_many_tokens_are_counted_where_asked():
    tokens = chain(100)
    part = counted(tokens, max_tokens=30)
    assert part.num_tokens == 30
    for mine, other in zip(part.levels, counted(tokens[:30]).levels, strict=True):
        np.testing.assert_array_equal(mine.codes, other.codes)
        np.testing.assert_array_equal(mine.counts, other.counts)
