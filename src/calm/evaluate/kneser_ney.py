"""Interpolated modified Kneser-Ney n-gram models of orders 1 to 5: the strongest language models that need only counting.

A token's probability is interpolated over ever shorter contexts,

    p_m(y | x) = (c(x, y) - D(c(x, y))) / c(x) + g(x) p_{m-1}(y | x without its oldest token),

with m tokens of context. For the longest contexts c(x, y) is how often x y occurs; for all shorter ones it is the number of
different tokens seen before x y (its continuation count). The discount D depends on the count (1, 2, or 3 and more) and on m.
g(x) gives exactly the discounted mass to the shorter context. Below the empty context lies the uniform distribution.

Discounts are the closed form from counts of counts, or fitted on held-out text from there (`fit_discounts`). A context may be
shorter than the order: id -1 (`NO_TOKEN`) fills it up in front, and the longest part that is there counts.

Source: Chen and Goodman 1998, sections 2.7 and 3 (closed form: equation 26). Differs: the text's own start counts as one more
token seen before. Numpy only.

Axis letters: *b batch · L tokens of context, oldest first · T tokens of text · V vocabulary · P different n-grams · X different
contexts
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from calm.errors import UsageError
from calm.evaluate.history import require_ids
from calm.evaluate.ngram_counts import Level, NgramCounts, require_order
from calm.evaluate.scalar_search import minimise_by_coordinates

LEAST_DISCOUNT = 0.02
"""The least discount: every token keeps some probability."""


def closed_form_discounts(counts: Int[np.ndarray, "P"]) -> Float[np.ndarray, "3"]:
    """D1, D2 and D3+ from the counts of counts n1..n4: D_c = c - (c + 1) Y n_{c+1} / n_c, Y = n1 / (n1 + 2 n2).

    Where a small text leaves one of them 0, the plain discount Y is used for all three (.5 without n1 or n2).
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    base = n[0] / (n[0] + 2 * n[1]) if n[0] and n[1] else 0.5
    if not n.all():
        return np.full(3, base)
    classes = np.arange(1, 4)
    return np.clip(classes - (classes + 1) * base * n[1:] / n[:3], LEAST_DISCOUNT, classes)


def _find(ascending: Int[np.ndarray, "P"], codes: Int[np.ndarray, "R"]) -> tuple[Int[np.ndarray, "R"], Bool[np.ndarray, "R"]]:
    """Where each code is, and whether it is there at all."""
    place = np.minimum(np.searchsorted(ascending, codes), len(ascending) - 1)
    return place, ascending[place] == codes


class _Smoothed(NamedTuple):
    """A level with its discounts applied."""

    probability: Float[np.ndarray, "P"]
    """p_m(y | x)"""
    backoff: Float[np.ndarray, "X"]
    """g(x)"""
    cumulative: Float[np.ndarray, "_"]
    """discounted counts of all n-grams before each, and their sum at the end"""


class _Evidence(NamedTuple):
    """All that the probability of a token after a context depends on at one level, besides the discounts."""

    count: Int[np.ndarray, "R"]
    total: Int[np.ndarray, "R"]
    classes: Int[np.ndarray, "3 R"]
    """how many different tokens were seen once, twice, and three times or more after the context"""


def _class(counts: Int[np.ndarray, "*p"]) -> Int[np.ndarray, "*p"]:
    """Which discount belongs to a count of at least 1."""
    return np.minimum(counts, 3) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class KneserNey:
    """p(y | x) of one order, with its discounts (rows: tokens of context; columns: D1, D2, D3+).

    Raises:
        UsageError: an order that was not counted.
    """

    counts: NgramCounts
    order: int
    discounts: Float[np.ndarray, "order 3"]

    def __post_init__(self):
        require_order(self.order)
        if self.order > self.counts.max_order:
            raise UsageError(f"order {self.order}: n-grams were counted up to order {self.counts.max_order}; count again")
        if not ((self.discounts > 0).all() and (self.discounts <= [1, 2, 3]).all()):
            raise UsageError("discounts D1, D2, D3+ lie above 0 and at or below 1, 2 and 3")

    @classmethod
    def closed_form(cls, counts: NgramCounts, order: int) -> "KneserNey":
        """The model with the discounts that the counts of counts give."""
        require_order(order)
        levels = min(order, len(counts.levels))
        rows = [closed_form_discounts(_counts_of(counts, order, m)) for m in range(levels)]
        return cls(counts, order, np.stack(rows + rows[-1:] * (order - levels)))

    @property
    def vocab_size(self) -> int:
        return self.counts.vocab_size

    @property
    def reach(self) -> int:
        """Tokens of context that it reads."""
        return self.order - 1

    @functools.cached_property
    def levels(self) -> tuple[Level, ...]:
        return self.counts.levels[: self.order]

    @functools.cached_property
    def _smoothed(self) -> list[_Smoothed]:
        found: list[_Smoothed] = []
        for m, level in enumerate(self.levels):
            counts = _counts_of(self.counts, self.order, m)
            left = counts - self.discounts[m][_class(counts)]
            totals = np.add.reduceat(counts, level.starts[:-1], dtype=np.int64)
            backoff = 1 - np.add.reduceat(left, level.starts[:-1]) / totals
            row = np.repeat(np.arange(len(totals)), np.diff(level.starts))
            below = found[-1].probability[level.lower] if m else 1 / self.vocab_size
            probability = left / totals[row] + backoff[row] * below
            found.append(_Smoothed(probability, backoff, np.concatenate([[0.0], np.cumsum(left)])))
        return found

    def _numbers(self, context: Integer[np.ndarray, "R L"]) -> list[Int[np.ndarray, "R"]]:
        """For m = 0.. the number of the context of the last m tokens among those that were seen, or -1."""
        length = context.shape[1]
        numbers = [np.zeros(len(context), np.int64)]
        for m, level in enumerate(self.levels[1:], start=1):
            number = np.full(len(context), -1, np.int64)
            if m <= length:
                rows = np.flatnonzero((numbers[-1] >= 0) & (context[:, length - m] >= 0))
                place, seen = _find(level.contexts, numbers[-1][rows] * self.vocab_size + context[rows, length - m])
                number[rows[seen]] = place[seen]
            numbers.append(number)
        return numbers

    def _probability(self, numbers: Sequence[Int[np.ndarray, "R"]], token: Integer[np.ndarray, "R"]) -> Float[np.ndarray, "R"]:
        result, left = np.full(len(token), 1 / self.vocab_size), np.arange(len(token))
        passed = np.ones(len(token))
        for number, level, smoothed in zip(*map(reversed, (numbers, self.levels, self._smoothed)), strict=True):
            here = number[left] >= 0
            rows = left[here]
            place, seen = _find(level.codes, number[rows] * self.vocab_size + token[rows])
            result[rows[seen]] = smoothed.probability[place[seen]]
            missed = rows[~seen]
            passed[missed] *= smoothed.backoff[number[missed]]
            left = np.concatenate([left[~here], missed])
        return result * passed

    def _pick(self, numbers: Sequence[Int[np.ndarray, "R"]], generator: np.random.Generator) -> Int[np.ndarray, "R"]:
        """From the longest context that was seen, with what it keeps; else from the next shorter one."""
        size = len(numbers[0])
        result, left = generator.integers(self.vocab_size, size=size), np.arange(size)
        for number, level, smoothed in zip(*map(reversed, (numbers, self.levels, self._smoothed)), strict=True):
            here = number[left] >= 0
            rows = left[here]
            stays = generator.random(len(rows)) >= smoothed.backoff[number[rows]]
            taken = rows[stays]
            start, end = level.starts[number[taken]], level.starts[number[taken] + 1]
            low, high = smoothed.cumulative[start], smoothed.cumulative[end]
            picks = low + generator.random(len(taken)) * (high - low)
            place = np.clip(np.searchsorted(smoothed.cumulative, picks, side="right") - 1, start, end - 1)
            result[taken] = level.codes[place] % self.vocab_size
            left = np.concatenate([left[~here], rows[~stays]])
        return result

    def conditional(self, context: Integer[np.ndarray, "*b L"], token: Integer[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """p(token | context), from the last `reach` tokens of each context.

        Raises:
            UsageError: a token or context id outside the vocabulary (`NO_TOKEN` in a context aside).
        """
        require_ids(self.vocab_size, context, token)
        numbers = self._numbers(_rows(context, self.reach))
        return self._probability(numbers, token.reshape(-1).astype(np.int64)).reshape(token.shape)

    def draw(self, context: Integer[np.ndarray, "*b L"], generator: np.random.Generator) -> Int[np.ndarray, "*b"]:
        """One next token for each context."""
        require_ids(self.vocab_size, context)
        return self._pick(self._numbers(_rows(context, self.reach)), generator).reshape(context.shape[:-1])

    def draw_with_probability(
        self, context: Integer[np.ndarray, "*b L"], generator: np.random.Generator
    ) -> tuple[Int[np.ndarray, "*b"], Float[np.ndarray, "*b"]]:
        """One next token for each context, and its probability."""
        require_ids(self.vocab_size, context)
        numbers, lead = self._numbers(_rows(context, self.reach)), context.shape[:-1]
        token = self._pick(numbers, generator)
        return token.reshape(lead), self._probability(numbers, token).reshape(lead)

    def _evidence(self, context: Integer[np.ndarray, "R L"], token: Integer[np.ndarray, "R"]) -> list[_Evidence]:
        found = []
        for m, (number, level) in enumerate(zip(self._numbers(_rows(context, self.reach)), self.levels, strict=True)):
            counts = _counts_of(self.counts, self.order, m)
            totals = np.add.reduceat(counts, level.starts[:-1], dtype=np.int64)
            classes = [np.add.reduceat(_class(counts) == c, level.starts[:-1], dtype=np.int64) for c in range(3)]
            place, seen = _find(level.codes, number * self.vocab_size + token)
            known = number >= 0
            found.append(
                _Evidence(
                    np.where(known & seen, counts[place], 0),
                    np.where(known, totals[number], 0),
                    np.stack([np.where(known, each[number], 0) for each in classes]),
                )
            )
        return found


def _counts_of(counts: NgramCounts, order: int, m: int) -> Int[np.ndarray, "P"]:
    """Occurrences for the longest contexts, continuation counts for shorter ones."""
    top = m == min(order, len(counts.levels)) - 1
    return counts.levels[m].counts if top else counts.levels[m].continuations


def _rows(context: Integer[np.ndarray, "*b L"], reach: int) -> Integer[np.ndarray, "R _"]:
    """The last `reach` tokens of each context, as rows."""
    kept = context[..., max(0, context.shape[-1] - reach) :]
    return kept.reshape(int(np.prod(context.shape[:-1])), kept.shape[-1])


def _discounted(
    evidence: Sequence[_Evidence], discounts: Float[np.ndarray, "order 3"], vocab_size: int
) -> Float[np.ndarray, "R"]:
    """The same probabilities from evidence: quick to compute again for other discounts."""
    p = np.full(len(evidence[0].count), 1 / vocab_size)
    for each, row in zip(evidence, discounts, strict=False):
        kept = np.where(each.count > 0, each.count - row[_class(np.maximum(each.count, 1))], 0.0)
        total = np.maximum(each.total, 1)
        p = np.where(each.total > 0, (kept + row @ each.classes * p) / total, p)
    return p


def fit_discounts(
    model: KneserNey, context: Integer[np.ndarray, "R L"], token: Integer[np.ndarray, "R"], *, sweeps: int = 4
) -> KneserNey:
    """The model with the discounts, all orders' D1, D2 and D3+, under which held-out tokens cost the fewest nats.

    The search starts at the model's own discounts and goes one discount at a time, `sweeps` times over all.

    Raises:
        UsageError: no held-out tokens, or ids outside the vocabulary.
    """
    if not len(token):
        raise UsageError("fitting discounts needs held-out tokens")
    require_ids(model.vocab_size, context, token)
    evidence, shape = model._evidence(context, token), model.discounts.shape

    def nats(flat: Float[np.ndarray, "_"]) -> float:
        return float(-np.log(_discounted(evidence, flat.reshape(shape), model.vocab_size)).mean())

    high = np.tile([1.0, 2.0, 3.0], model.order)
    best = minimise_by_coordinates(nats, model.discounts.reshape(-1), np.full(len(high), LEAST_DISCOUNT), high, sweeps=sweeps)
    return dataclasses.replace(model, discounts=best.reshape(shape))
