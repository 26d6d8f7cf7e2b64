"""Counts of all n-grams of a text up to some order, in the form that Kneser-Ney smoothing needs.

A trie over contexts read backwards: a context of m tokens is the context of its last m - 1 tokens (numbered, a level below) and
one token further back. So the contexts of all lengths before a token are found one after the other, up to the longest that was
seen. Sorted arrays of int64 codes hold everything; looking up is a binary search. Numpy only.

Axis letters: T tokens of text · P different n-grams of one length · X different contexts of one length
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from calm.errors import UsageError
from calm.evaluate.ngram import TokenSource

MAX_ORDER = 5


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """The n-grams x y with m tokens of context x, sorted by context and then by y.

    Attributes:
        contexts: (number of x without its oldest token, a level below) * V + oldest token, ascending. Position = number of x.
        codes: (number of x) * V + y, ascending.
        counts: how often x y occurs.
        continuations: how many different tokens (or the start of the text) come before x y.
        lower: position of x y without its oldest token among the n-grams of the level below; 0 where there is none below.
        starts: position of each context's first n-gram, and P at the end.
    """

    contexts: Int[np.ndarray, "X"]
    codes: Int[np.ndarray, "P"]
    counts: Int[np.ndarray, "P"]
    continuations: Int[np.ndarray, "P"]
    lower: Int[np.ndarray, "P"]
    starts: Int[np.ndarray, "_"]


class NgramCounts(NamedTuple):
    """N-grams of a text up to some order. Models of every lower order are built on the same counts."""

    levels: tuple[Level, ...]
    vocab_size: int
    num_tokens: int
    max_order: int


class _Ranks(NamedTuple):
    """Different values ascending; one place of each; the number of each entry's value; how often each occurs."""

    values: np.ndarray
    place: np.ndarray
    number: np.ndarray
    counts: np.ndarray


def _ranked(codes: Int[np.ndarray, "T"]) -> _Ranks:
    order = np.argsort(codes)
    ordered = codes[order]
    new = np.ones(len(codes), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    number = np.empty(len(codes), np.int32)
    number[order] = np.cumsum(new, dtype=np.int32) - 1
    starts = np.flatnonzero(new)
    return _Ranks(ordered[starts], order[starts], number, np.diff(starts, append=len(codes)).astype(np.int32))


def count_ngrams(
    split: TokenSource, vocab_size: int, *, max_order: int = MAX_ORDER, max_tokens: int | None = None
) -> NgramCounts:
    """Counts every n-gram of a split, n = 1..max_order, by sorting: two sorts of the text for each n.

    N-grams run across document ends, as they do for a language model that reads the same stream. Everything is in memory: for
    natural text and 5 orders about 170 bytes a token while counting and 70 after, and 50 more for each model that was used.

    Args:
        max_tokens: count only this many tokens from the start, where a split does not fit into memory; all by default.

    Raises:
        UsageError: an order outside 1..5, an empty split, or a token id outside the vocabulary.
    """
    require_order(max_order)
    size = split.num_tokens if max_tokens is None else min(split.num_tokens, max_tokens)
    if size < 1:
        raise UsageError("an n-gram model needs at least one token to be fitted on")
    tokens = np.asarray(split.read(0, size), np.int64)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise UsageError(f"the split holds token id {tokens.max()}, the vocabulary has {vocab_size}: other data?")
    levels: list[Level] = []
    context = gram = _ranked(np.zeros(size, np.int64))
    for m in range(min(max_order, size)):
        if m:
            # Number k belongs to the token at m - 1 + k, whose context is now known one token further back.
            context = _ranked(context.number[1:].astype(np.int64) * vocab_size + tokens[: size - m])
        shorter, gram = gram, _ranked(context.number.astype(np.int64) * vocab_size + tokens[m:])
        lower = shorter.number[gram.place + 1] if m else np.zeros(len(gram.values), np.int32)
        if m:
            levels[-1].continuations[:] += np.bincount(lower, minlength=len(shorter.values)).astype(np.int32)
        starts = np.searchsorted(gram.values, np.arange(len(context.values) + 1, dtype=np.int64) * vocab_size)
        start_of_text = np.zeros(len(gram.values), np.int32)
        start_of_text[gram.number[0]] = 1
        levels.append(Level(context.values, gram.values, gram.counts, start_of_text, lower, starts))
    return NgramCounts(tuple(levels), vocab_size, size, max_order)


def require_order(order: int) -> None:
    if not 1 <= order <= MAX_ORDER:
        raise UsageError(f"order of an n-gram model: from 1 to {MAX_ORDER}, got {order}")
