"""A cache over an n-gram model: what followed earlier in the same text, wherever its last tokens were the same.

With n_m(y) the number of earlier places where the last m tokens were those of now and y came next, n_m their sum and t_m the
number of different y, the base model is interpolated with the history's own statistics, shortest match first:

    p_0(y) = w_0 n_0(y) / n_0 + (1 - w_0) p_base(y),        w_0 = a n_0 / (n_0 + b_0)       (all tokens so far)
    p_m(y) = w_m n_m(y) / n_m + (1 - w_m) p_{m-1}(y),       w_m = n_m / (n_m + b_m t_m)     m = 1..4; w_m = 0 without a match

so the longest match comes first. The weights a, b_0..b_4 are fitted on held-out text (`fit_cache`). When text is sampled, the
tokens already drawn are part of the history.

Source: Kuhn and De Mori 1990 (cache), Jelinek et al. 1991 (cache of n-grams), Witten and Bell 1991 (w_m). Numpy only.

Axis letters: *b batch · R rows · L tokens of history, the newest last · Q matches of all rows · M longest match
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer

from calm.errors import UsageError
from calm.evaluate.history import ENTRIES_AT_ONCE, HistoryModel, require_ids
from calm.evaluate.scalar_search import minimise_by_coordinates

LONGEST = 4


class _Matches(NamedTuple):
    """Earlier places where the last token was that of now, row by row."""

    row: Int[np.ndarray, "Q"]
    token: Int[np.ndarray, "Q"]
    """the token that came next there"""
    length: Int[np.ndarray, "Q"]
    """how many tokens are the same, at most `LONGEST`"""


class _Evidence(NamedTuple):
    """n_m, t_m and, of the tokens asked for, n_m(y), m = 0..LONGEST; t_0 is not used and 0."""

    total: Float[np.ndarray, "M R"]
    types: Float[np.ndarray, "M R"]
    hits: Float[np.ndarray, "M R"]


def _matches(context: Integer[np.ndarray, "R L"]) -> _Matches:
    length = context.shape[1]
    if length < 2:
        none = np.zeros(0, np.int64)
        return _Matches(none, none, none)
    last = context[:, -1:]
    row, place = np.nonzero((context[:, :-1] == last) & (last >= 0))
    place += 1
    same, going = np.ones(len(row), np.int64), np.arange(len(row))
    for m in range(2, min(LONGEST, length - 1) + 1):
        going = going[place[going] >= m]
        now = context[row[going], length - m]
        going = going[(context[row[going], place[going] - m] == now) & (now >= 0)]
        same[going] += 1
    return _Matches(row, context[row, place].astype(np.int64), same)


def _evidence(
    context: Integer[np.ndarray, "R L"], found: _Matches, vocab_size: int, token: Integer[np.ndarray, "R"] | None
) -> _Evidence:
    size = len(context)
    total, types, hits = np.zeros((3, LONGEST + 1, size))
    total[0] = (context >= 0).sum(1)
    # The longest match of each different (row, token).
    order = np.argsort(found.row * vocab_size + found.token)
    codes = (found.row * vocab_size + found.token)[order]
    first = np.flatnonzero(np.diff(codes, prepend=-1))
    longest = np.maximum.reduceat(found.length[order], first) if len(first) else found.length
    row_of = codes[first] // vocab_size
    for m in range(1, LONGEST + 1):
        total[m] = np.bincount(found.row[found.length >= m], minlength=size)
        types[m] = np.bincount(row_of[longest >= m], minlength=size)
    if token is None:
        return _Evidence(total, types, hits)
    hits[0] = (context == token[:, None]).sum(1)
    hit = found.token == token[found.row]
    for m in range(1, LONGEST + 1):
        hits[m] = np.bincount(found.row[hit & (found.length >= m)], minlength=size)
    return _Evidence(total, types, hits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheWeights:
    """a and b_0 of the unigram cache, and b_m of matches of m = 1..4 tokens. The defaults were fitted on an encyclopedia."""

    share: float = 0.075
    tokens: float = 75.0
    matches: tuple[float, ...] = (8.0, 11.0, 30.0, 6.0)

    def __post_init__(self):
        if not 0 <= self.share < 1 or not self.tokens > 0 or len(self.matches) != LONGEST or not min(self.matches) > 0:
            raise UsageError(f"cache weights: share in [0, 1), tokens > 0 and {LONGEST} matches > 0, got {self}")

    def of(self, evidence: _Evidence) -> Float[np.ndarray, "M R"]:
        """w_m for m = 0..LONGEST."""
        total, types = evidence.total, evidence.types
        first = self.share * total[:1] / (total[:1] + self.tokens)
        rest = total[1:] / np.maximum(total[1:] + np.array(self.matches)[:, None] * types[1:], 1)
        return np.concatenate([first, rest])

    def mix(self, evidence: _Evidence, base: Float[np.ndarray, "R"]) -> Float[np.ndarray, "R"]:
        """p(y) of the tokens that `evidence` was gathered for, from the base model's."""
        p = base
        for weight, hits, total in zip(self.of(evidence), evidence.hits, evidence.total, strict=True):
            p = weight * hits / np.maximum(total, 1) + (1 - weight) * p
        return p


@dataclasses.dataclass(frozen=True, eq=False)
class Cached:
    """A base model interpolated with a cache of the history that it is given: one block, or one text."""

    base: HistoryModel
    weights: CacheWeights = CacheWeights()

    @property
    def vocab_size(self) -> int:
        return self.base.vocab_size

    @property
    def reach(self) -> None:
        """It reads the whole history."""
        return None

    def conditional(self, context: Integer[np.ndarray, "*b L"], token: Integer[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """p(token | context).

        Raises:
            UsageError: a token or context id outside the vocabulary (`NO_TOKEN` in a context aside).
        """
        require_ids(self.vocab_size, context, token)
        flat = token.reshape(-1)

        def part(rows: Integer[np.ndarray, "R L"], where: slice) -> tuple[np.ndarray]:
            evidence = _evidence(rows, _matches(rows), self.vocab_size, flat[where])
            return (self.weights.mix(evidence, self.base.conditional(rows, flat[where])),)

        return _in_parts(part, context)[0].reshape(token.shape)

    def draw(self, context: Integer[np.ndarray, "*b L"], generator: np.random.Generator) -> Int[np.ndarray, "*b"]:
        """One next token for each context."""
        require_ids(self.vocab_size, context)
        result = _in_parts(lambda rows, _: (self._pick(rows, _matches(rows), generator),), context)[0]
        return result.reshape(context.shape[:-1])

    def draw_with_probability(
        self, context: Integer[np.ndarray, "*b L"], generator: np.random.Generator
    ) -> tuple[Int[np.ndarray, "*b"], Float[np.ndarray, "*b"]]:
        """One next token for each context, and its probability."""
        require_ids(self.vocab_size, context)

        def part(rows: Integer[np.ndarray, "R L"], _: slice) -> tuple[np.ndarray, np.ndarray]:
            found = _matches(rows)
            token = self._pick(rows, found, generator)
            evidence = _evidence(rows, found, self.vocab_size, token)
            return token, self.weights.mix(evidence, self.base.conditional(rows, token))

        token, probability = _in_parts(part, context)
        return token.reshape(context.shape[:-1]), probability.reshape(context.shape[:-1])

    def _pick(
        self, context: Integer[np.ndarray, "R L"], found: _Matches, generator: np.random.Generator
    ) -> Int[np.ndarray, "R"]:
        """From the longest match with its weight, else from the next shorter one, at last from the base model."""
        evidence = _evidence(context, found, self.vocab_size, None)
        weights = self.weights.of(evidence)
        result, left = np.zeros(len(context), np.int64), np.arange(len(context))
        for m in range(LONGEST, -1, -1):
            takes = generator.random(len(left)) < weights[m, left]
            rows, left = left[takes], left[~takes]
            size = evidence.total[m].astype(np.int64)
            nth = np.floor(generator.random(len(rows)) * size[rows]).astype(np.int64)
            if m:
                tokens = found.token[found.length >= m]  # ascending in rows
                result[rows] = tokens[(np.cumsum(size) - size)[rows] + nth]
            else:
                result[rows] = context[rows, context.shape[1] - 1 - nth]
        result[left] = self.base.draw(context[left], generator)
        return result


def _in_parts(
    function: Callable[[np.ndarray, slice], tuple[np.ndarray, ...]], context: Integer[np.ndarray, "*b L"]
) -> tuple[np.ndarray, ...]:
    """The results for all rows, a few rows at a time: about `ENTRIES_AT_ONCE` entries are compared at once."""
    rows = context.reshape(int(np.prod(context.shape[:-1])), context.shape[-1])
    step = max(1, ENTRIES_AT_ONCE // max(1, rows.shape[1]))
    slices = [slice(start, start + step) for start in range(0, max(1, len(rows)), step)]
    return tuple(np.concatenate(each) for each in zip(*(function(rows[where], where) for where in slices), strict=True))


def fit_cache(
    base: HistoryModel, context: Integer[np.ndarray, "R L"], token: Integer[np.ndarray, "R"], *, sweeps: int = 4
) -> Cached:
    """The base model with the cache weights under which held-out tokens, each after its own history, cost the fewest nats.

    Raises:
        UsageError: no held-out tokens, or ids outside the vocabulary.
    """
    if not len(token):
        raise UsageError("fitting the cache needs held-out tokens")
    require_ids(base.vocab_size, context, token)

    def part(rows: Integer[np.ndarray, "R L"], where: slice) -> tuple[np.ndarray, np.ndarray]:
        found = _evidence(rows, _matches(rows), base.vocab_size, token[where])
        return np.stack(found).transpose(2, 0, 1), base.conditional(rows, token[where])

    stacked, probability = _in_parts(part, context)
    evidence = _Evidence(*stacked.transpose(1, 2, 0))

    def weights(point: Float[np.ndarray, "_"]) -> CacheWeights:
        rest = np.exp(point[1:]).tolist()
        return CacheWeights(share=float(point[0]), tokens=rest[0], matches=tuple(rest[1:]))

    def nats(point: Float[np.ndarray, "_"]) -> float:
        return float(-np.log(weights(point).mix(evidence, probability)).mean())

    default = CacheWeights()
    start = np.array([default.share, *np.log([default.tokens, *default.matches])])
    low, high = np.array([0.0, *[-2.0] * (LONGEST + 1)]), np.array([0.95, *[10.0] * (LONGEST + 1)])
    return Cached(base, weights(minimise_by_coordinates(nats, start, low, high, sweeps=sweeps)))
