"""How much written text repeats itself, and how much its texts differ: sums over n-grams of token rows.

A model can look good to a judge of likelihood by saying little, again and again; these numbers show it. Both move with the
number and the length of the texts, so only equal amounts of text can be compared, the held-out text's own among them.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from calm.errors import UsageError


def ngrams(row: Int[np.ndarray, "T"], n: int) -> Int[np.ndarray, "X n"]:
    """All runs of n tokens; none in a shorter row."""
    if n < 1:
        raise UsageError(f"n-grams need n of at least 1, got {n}")
    return np.lib.stride_tricks.sliding_window_view(row, n) if len(row) >= n else np.zeros((0, n), row.dtype)


def repeated(rows: Sequence[Int[np.ndarray, "_"]], n: int) -> Float[np.ndarray, "R 2"]:
    """For each row, how many of its n-grams stood in it before, and how many there are.

    Their ratio is seq-rep-n (Welleck et al., arXiv:1908.04319): 1 minus the share of different n-grams.
    """
    counts = [(len(found := ngrams(row, n)), len(np.unique(found, axis=0))) for row in rows]
    return np.array([(total - different, total) for total, different in counts], np.float64).reshape(-1, 2)


def distinct(rows: Sequence[Int[np.ndarray, "_"]], n: int) -> float:
    """distinct-n (Li et al., arXiv:1510.03055): different n-grams of all rows together over all n-grams; nan without any."""
    every = np.concatenate([ngrams(row, n) for row in rows]) if rows else np.zeros((0, n))
    return len(np.unique(every, axis=0)) / len(every) if len(every) else float("nan")
