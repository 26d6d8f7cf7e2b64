"""A judge of text that no adaptation ever saw: logistic regression on hashed words and pairs of words.

Critics judge latents, and whatever raises a critic may do so by latents that mean nothing once they are text. So what is
reported is the opinion of a plain classifier of decoded text, trained on another split. It is numpy alone, and deterministic.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Float

from calm.errors import UsageError
from calm.ttt.word_shares import words_of

BUCKETS = 4096
LEAST = 8  # texts of each kind


@dataclasses.dataclass(frozen=True)
class TextJudge:
    """log-odds that a text is of the wanted kind."""

    weights: Float[np.ndarray, "X"]
    bias: float
    rarity: Float[np.ndarray, "X"]
    hidden: frozenset[str]
    """words that it does not look at"""
    area: float
    """how often a wanted text of the part that was held out scores above an unwanted one (area under the ROC curve)"""

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "R"]:
        return _features(texts, self.hidden) * self.rarity @ self.weights + self.bias


def fit_judge(
    wanted: Sequence[str], unwanted: Sequence[str], *, hidden: Collection[str] = (), decay: float = 1e-3, seed: int = 0
) -> TextJudge:
    """Both kinds count alike, however many there are; a fifth is held out, for `area` alone.

    `hidden` words are taken out of every text: of a concept, its own, so that the judge has to go by what comes with them.

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
    """The least of the weighted log loss plus decay |w|^2 / 2, by Nesterov's method at the step that its curvature allows."""
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
    """Roots of counts of words and of pairs of neighbours, by bucket, each row of length 1."""
    found = np.zeros((len(texts), BUCKETS), np.float32)
    for row, text in enumerate(texts):
        words = [word for word in words_of(text) if word not in hidden]
        for gram in (*words, *(f"{one} {two}" for one, two in itertools.pairwise(words))):
            found[row, zlib.crc32(gram.encode()) % BUCKETS] += 1
    found = np.sqrt(found)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)
