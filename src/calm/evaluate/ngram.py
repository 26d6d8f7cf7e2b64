"""Unigram and bigram models: the baselines whose Brier-n is known exactly, so that a trained model has something to
beat.

Both are fitted by counting a split once, in pieces, and have no parameter to tune: Witten-Bell smoothing gives the
unseen a share that follows from how many different continuations were seen. They score the same chunk boundaries,
from the same context, as a latent language model does, with Brier-n in closed form instead of from samples.

Source: Witten and Bell 1991 (interpolated form as in Chen and Goodman 1998, section 2.4). Numpy only.
"""

import dataclasses
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

from calm.errors import UsageError


@runtime_checkable
class TokenSource(Protocol):
    """What fitting needs of a split (`calm.text.shards.Split` is one)."""

    @property
    def num_tokens(self) -> int: ...

    def read(self, start: int, length: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Unigram:
    """p(y) = (c(y) + types / V) / (c + types): counts, interpolated with the uniform distribution over V tokens."""

    probability: Float[np.ndarray, "V"]

    @classmethod
    def from_counts(cls, counts: Int[np.ndarray, "V"]) -> "Unigram":
        types = np.count_nonzero(counts)
        if not types:
            raise UsageError("an n-gram model needs at least one token to be fitted on")
        return cls((counts + types / len(counts)) / (counts.sum() + types))

    @property
    def vocab_size(self) -> int:
        return len(self.probability)

    def conditional(self, context: Int[np.ndarray, "*b"], token: Int[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """p(token | context): the context does not matter here."""
        return np.asarray(self.probability[token])

    def self_match(self, orders: int) -> Float[np.ndarray, "O V"]:
        """s_n(x) = sum over n-grams of p(n-gram | context x)^2, rows n = 1..O."""
        powers = np.sum(self.probability**2) ** np.arange(1, orders + 1)
        return np.broadcast_to(powers[:, None], (orders, self.vocab_size))

    def draw(self, context: Int[np.ndarray, "*b"], generator: np.random.Generator) -> Int[np.ndarray, "*b"]:
        """One next token for each context."""
        cumulative = np.cumsum(self.probability)
        picks = np.searchsorted(cumulative, generator.random(context.shape) * cumulative[-1], side="right")
        return np.asarray(np.minimum(picks, self.vocab_size - 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Bigram:
    """p(y | x) = (c(x, y) + t(x) u(y)) / (c(x) + t(x)), t(x) the number of different tokens seen after x, u the
    unigram model.

    Counts are sparse: `codes` x * V + y ascending, with `counts` beside them, and `starts[x]` where the row of x
    begins.
    """

    unigram: Unigram
    codes: Int[np.ndarray, "P"]
    counts: Int[np.ndarray, "P"]
    starts: Int[np.ndarray, "_"]

    @classmethod
    def from_pairs(cls, unigram: Unigram, codes: Int[np.ndarray, "P"], counts: Int[np.ndarray, "P"]) -> "Bigram":
        starts = np.searchsorted(codes, np.arange(unigram.vocab_size + 1, dtype=np.int64) * unigram.vocab_size)
        return cls(unigram, codes, counts, starts)

    @property
    def vocab_size(self) -> int:
        return self.unigram.vocab_size

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """c(x) and t(x) for every x."""
        cumulative = np.concatenate([[0], np.cumsum(self.counts)])
        return np.diff(cumulative[self.starts]), np.diff(self.starts)

    def _shares(self) -> tuple[np.ndarray, np.ndarray]:
        """1 / (c(x) + t(x)) and the unigram's weight g(x) = t(x) / (c(x) + t(x)); a context never seen leaves all to
        the unigram.
        """
        totals, types = self._rows()
        inverse = 1 / np.maximum(totals + types, 1)
        return inverse, np.where(types > 0, types * inverse, 1.0)

    def conditional(self, context: Int[np.ndarray, "*b"], token: Int[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
        """p(token | context)."""
        inverse, weight = self._shares()
        code = context.astype(np.int64) * self.vocab_size + token
        place = np.minimum(np.searchsorted(self.codes, code), len(self.codes) - 1)
        count = np.where(self.codes[place] == code, self.counts[place], 0) if len(self.codes) else 0
        return np.asarray(count * inverse[context] + weight[context] * self.unigram.probability[token])

    def self_match(self, orders: int) -> Float[np.ndarray, "O V"]:
        """s_n(x) = sum over n-grams of p(n-gram | context x)^2, rows n = 1..O, by s_n(x) = sum_y p(y | x)^2
        s_{n-1}(y), s_0 = 1.

        With p = b + g u, b sparse: p^2 = b (b + 2 g u) + g^2 u^2, so an order costs one pass over the pairs that were
        seen.
        """
        inverse, weight = self._shares()
        first, second = self.codes // self.vocab_size, self.codes % self.vocab_size
        base = self.unigram.probability
        seen = self.counts * inverse[first]
        sparse = seen * (seen + 2 * weight[first] * base[second])
        rows, previous = [], np.ones(self.vocab_size)
        for _ in range(orders):
            from_pairs = np.bincount(first, weights=sparse * previous[second], minlength=self.vocab_size)
            previous = from_pairs + weight**2 * np.sum(base**2 * previous)
            rows.append(previous)
        return np.stack(rows)

    def draw(self, context: Int[np.ndarray, "*b"], generator: np.random.Generator) -> Int[np.ndarray, "*b"]:
        """One next token for each context: from the unigram with its share, else from the counts of the row."""
        _, weight = self._shares()
        fallback = self.unigram.draw(context, generator)
        use_unigram = generator.random(context.shape) < weight[context]
        if not len(self.codes):
            return fallback
        cumulative = np.concatenate([[0], np.cumsum(self.counts)])
        low, high = cumulative[self.starts[context]], cumulative[self.starts[context + 1]]
        pick = low + np.floor(generator.random(context.shape) * (high - low)).astype(np.int64)
        place = np.clip(np.searchsorted(cumulative, pick, side="right") - 1, 0, len(self.codes) - 1)
        return np.where(use_unigram, fallback, self.codes[place] % self.vocab_size)


Ngram = Unigram | Bigram


def log_prob(model: Ngram, context: Int[np.ndarray, "*b"], tokens: Int[np.ndarray, "*b n"]) -> Float[np.ndarray, "*b n"]:
    """Natural log-probability of each of n tokens that follow `context`, each given the one before it."""
    before = np.concatenate([context[..., None], tokens[..., :-1]], axis=-1)
    return np.log(model.conditional(before, tokens))


def exact_brier(model: Ngram, context: Int[np.ndarray, "*b"], targets: Int[np.ndarray, "*b K"]) -> Float[np.ndarray, "*b O"]:
    """2 P(y) - sum P^2 of the first n tokens after `context`, n = 1..min(K, 4): what `brier_argmax` estimates from
    samples.
    """
    orders = min(targets.shape[-1], 4)
    targets = targets[..., :orders]
    before = np.concatenate([context[..., None], targets[..., :-1]], axis=-1)
    hits = np.cumprod(model.conditional(before, targets), axis=-1)
    return 2 * hits - np.moveaxis(model.self_match(orders)[:, context], 0, -1)


def sample(
    model: Ngram, context: Int[np.ndarray, "*b"], *, num_tokens: int, num_samples: int, seed: int
) -> Int[np.ndarray, "S *b K"]:
    """S independent continuations of `num_tokens` tokens for each context."""
    generator = np.random.default_rng(seed)
    last = np.broadcast_to(context, (num_samples, *context.shape))
    tokens = []
    for _ in range(num_tokens):
        last = model.draw(last, generator)
        tokens.append(last)
    return np.stack(tokens, axis=-1)


def _merge(runs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    codes = np.concatenate([codes for codes, _ in runs])
    codes, place = np.unique(codes, return_inverse=True)
    counts = np.zeros(len(codes), np.int64)
    np.add.at(counts, place.reshape(-1), np.concatenate([counts for _, counts in runs]))
    return codes, counts


def fit_ngrams(split: TokenSource, vocab_size: int, *, batch_tokens: int = 2**21) -> tuple[Unigram, Bigram]:
    """Counts a split once, `batch_tokens` at a time; memory holds the different pairs seen, not the tokens.

    Pairs run across document ends, as they do for a language model reading the same stream.

    Raises:
        UsageError: an empty split, or a token id outside the vocabulary.
    """
    counts = np.zeros(vocab_size, np.int64)
    runs: list[tuple[np.ndarray, np.ndarray]] = []
    previous: np.ndarray = np.zeros(0, np.int64)
    for start in range(0, split.num_tokens, batch_tokens):
        tokens = np.asarray(split.read(start, min(batch_tokens, split.num_tokens - start)), np.int64)
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise UsageError(f"the split holds token id {tokens.max()}, the vocabulary has {vocab_size}: other data?")
        counts += np.bincount(tokens, minlength=vocab_size)
        joined = np.concatenate([previous, tokens])
        codes, number = np.unique(joined[:-1] * vocab_size + joined[1:], return_counts=True)
        runs.append((codes, number))
        # Runs are merged like digits of a binary counter, so every pair is copied a logarithmic number of times.
        while len(runs) > 1 and len(runs[-2][0]) <= 2 * len(runs[-1][0]):
            runs[-2:] = [_merge(runs[-2:])]
        previous = tokens[-1:]
    unigram = Unigram.from_counts(counts)
    return unigram, Bigram.from_pairs(unigram, *_merge(runs))
