"""Measures of text that no adaptation optimises: a classifier of decoded text, and shares of words.

Critics judge latents, and whatever raises a critic may do so by latents that mean nothing as text. The classifier is a
logistic regression on hashed words and pairs of words, trained on another split; it is numpy alone, and deterministic.
"""

import dataclasses
import itertools
import re
import zlib
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float

from calm.errors import UsageError

BUCKETS = 4096
LEAST = 8  # texts of each kind


@dataclasses.dataclass(frozen=True)
class TextJudge:
    """Classifier of the wanted kind of text; called on R texts it returns their log-odds."""

    weights: Float[np.ndarray, "X"]
    bias: float
    rarity: Float[np.ndarray, "X"]
    hidden: frozenset[str]
    """words that are ignored"""
    area: float
    """share of held-out pairs in which the wanted text scores above the unwanted one (area under the ROC curve)"""

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "R"]:
        return _features(texts, self.hidden) * self.rarity @ self.weights + self.bias


def fit_judge(
    wanted: Sequence[str], unwanted: Sequence[str], *, hidden: Collection[str] = (), decay: float = 1e-3, seed: int = 0
) -> TextJudge:
    """Fits a classifier. Both kinds have the same weight, whatever their numbers; a fifth is held out, for `area` alone.

    `hidden` words are removed from every text, such as a concept's own, so that the context of the words decides.

    Raises:
        UsageError: fewer than eight texts of a kind.
    """
    for kind, texts in (("wanted", wanted), ("unwanted", unwanted)):
        if len(texts) < LEAST:
            raise UsageError(
                f"text judge: {len(texts)} {kind} texts are too few, it needs {LEAST}; use more text or other words"
            )
    generator, away = np.random.default_rng(seed), frozenset(word.lower() for word in hidden)
    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for texts in (unwanted, wanted):
        held = np.arange(len(texts)) < max(2, len(texts) // 5)
        rows = _features(texts, away)[generator.permutation(len(texts))]
        parts[True].append(rows[held])
        parts[False].append(rows[~held])
    train = np.concatenate(parts[False])
    rarity = np.log((1 + len(train)) / (1 + (train > 0).sum(0))).astype(np.float32)
    label = np.repeat([0.0, 1.0], [len(rows) for rows in parts[False]])
    share = np.where(label > 0, 0.5 / label.sum(), 0.5 / (1 - label).sum())
    weights, bias = _descend(train * rarity, label, share, decay)
    below, above = (rows * rarity @ weights for rows in parts[True])
    compared = np.sign(above[:, None] - below[None])
    return TextJudge(weights, bias, rarity, away, float((compared.mean() + 1) / 2))


def _descend(
    rows: Float[np.ndarray, "R X"], label: Float[np.ndarray, "R"], share: Float[np.ndarray, "R"], decay: float, steps: int = 300
) -> tuple[Float[np.ndarray, "X"], float]:
    """Minimiser of the weighted log loss plus decay |w|^2 / 2: Nesterov's method with the step that its curvature allows."""
    rows = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)
    rate = 4 / (float(share @ np.square(rows).sum(1)) + 4 * decay)
    weights = ahead = np.zeros(rows.shape[1])
    for step in range(steps):
        odds = 1 / (1 + np.exp(-np.clip(rows @ ahead, -50, 50)))
        gradient = rows.T @ (share * (odds - label)) + decay * np.append(ahead[:-1], 0.0)
        new = ahead - rate * gradient
        ahead, weights = new + step / (step + 3) * (new - weights), new
    return weights[:-1].astype(np.float32), float(weights[-1])


def _features(texts: Sequence[str], hidden: frozenset[str]) -> Float[np.ndarray, "R X"]:
    """Square roots of the counts of words and of neighbouring pairs, by bucket; rows have length 1."""
    found = np.zeros((len(texts), BUCKETS), np.float32)
    for row, text in enumerate(texts):
        words = [word for word in words_of(text) if word not in hidden]
        for gram in (*words, *(f"{one} {two}" for one, two in itertools.pairwise(words))):
            found[row, zlib.crc32(gram.encode()) % BUCKETS] += 1
    found = np.sqrt(found)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)


# -- words ------------------------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
STOP_WORDS = frozenset(
    """a about above after again against all also am an and any are as at be because been before being below between both
    but by can could did do does doing down during each few for from further had has have having he her here hers herself
    him himself his how i if in into is it its itself just may me might more most must my myself no nor not now of off on
    once only or other our ours ourselves out over own same shall she should so some such than that the their theirs them
    themselves then there these they this those through to too under until up upon us very was we were what when where which
    while who whom why will with would yet you your yours yourself yourselves""".split()
)
"""English function words"""


def words_of(text: str) -> list[str]:
    """Words of a text in lower case, without digits and signs."""
    return [word.lower() for word in _WORD.findall(text)]


def word_counts(texts: Sequence[str], among: Collection[str]) -> Float[np.ndarray, "R 2"]:
    """Number of words of each text that are in `among`, and number of words."""
    rows = [words_of(text) for text in texts]
    return np.array([(sum(word in among for word in row), len(row)) for row in rows], np.float64).reshape(-1, 2)
