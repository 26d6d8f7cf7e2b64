"""Sums that merge, and intervals that resample whole documents.

A score is a sum and a count, divided once, so ragged batches stay unbiased and the parts of a split add up to the
whole. Neighbouring positions are dependent, so an interval resamples documents, never positions: where there are
fewer than `MIN_DOCUMENTS` documents it resamples runs of blocks of at least `MIN_UNIT_TOKENS` tokens instead. Two
models are compared by resampling the same units for both and looking at the difference (paired bootstrap).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from calm.errors import UsageError

MIN_DOCUMENTS = 30
MIN_UNIT_TOKENS = 1024

Statistic = Callable[[np.ndarray], np.ndarray]
"""Means `[*draws F]` -> one number for each draw `[*draws]`."""


class Mean(NamedTuple):
    """A running mean as its sum and its count; `+` merges two, `value` divides once. Works inside jit."""

    total: Shaped[Array, "..."] | Shaped[np.ndarray, "..."] | float
    count: Shaped[Array, "..."] | Shaped[np.ndarray, "..."] | float

    def __add__(self, other: "Mean") -> "Mean":  # type: ignore[override]
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self):
        """total / count; nan where nothing was counted."""
        return self.total / self.count if np.ndim(self.count) or self.count else float("nan")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its bootstrap percentile interval. `low` and `high` are nan when there are fewer than two
    units.
    """

    estimate: float
    low: float
    high: float
    level: float = 0.95
    units: int = 0
    unit: str = "document"

    def scaled(self, factor: float) -> "Interval":
        return dataclasses.replace(self, estimate=self.estimate * factor, low=self.low * factor, high=self.high * factor)

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside: for a difference of two models, whether one is above the other."""
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float | int | str | None]:
        values = dataclasses.asdict(self)
        return {name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Interval":
        restored: dict[str, Any] = {name: float("nan") if value is None else value for name, value in values.items()}
        return cls(**restored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSums:
    """Sums of F scores and their counts for each of R blocks of text, kept apart so that blocks can be resampled.

    Merge parts of a split with `BlockSums.concatenate`; the order of blocks is the order of the text.
    """

    total: Float[np.ndarray, "R F"]
    count: Float[np.ndarray, "R"]
    document: Int[np.ndarray, "R"]
    block_tokens: int

    def __post_init__(self):
        if not len(self.total) == len(self.count) == len(self.document):
            rows = [len(self.total), len(self.count), len(self.document)]
            raise UsageError(f"total, count and document need one row a block, got {rows} rows")

    @classmethod
    def concatenate(cls, parts: Sequence["BlockSums"]) -> "BlockSums":
        if len({part.block_tokens for part in parts}) != 1:
            raise UsageError(f"parts have different block sizes: {sorted({part.block_tokens for part in parts})} tokens")
        return cls(
            total=np.concatenate([part.total for part in parts]),
            count=np.concatenate([part.count for part in parts]),
            document=np.concatenate([part.document for part in parts]),
            block_tokens=parts[0].block_tokens,
        )

    @property
    def means(self) -> Float[np.ndarray, "F"]:
        """The mean of each score over all counted positions."""
        return self.total.sum(0) / self.count.sum()

    def units(self) -> tuple[Int[np.ndarray, "R"], str]:
        """Units that the bootstrap resamples: the unit of each block, numbered from 0, and the unit's name."""
        names, unit = np.unique(self.document, return_inverse=True)
        if len(names) >= MIN_DOCUMENTS:
            return unit.reshape(-1), "document"
        run = -(-MIN_UNIT_TOKENS // self.block_tokens)
        # A shorter last run joins the one before it: every unit has at least MIN_UNIT_TOKENS.
        last = max(len(self.count) // run - 1, 0)
        return np.minimum(np.arange(len(self.count)) // run, last), f"block of {run * self.block_tokens} tokens"

    def per_unit(self) -> tuple[Float[np.ndarray, "U F"], Float[np.ndarray, "U"], str]:
        unit, name = self.units()
        size = int(unit.max()) + 1 if len(unit) else 0
        total, count = np.zeros((size, self.total.shape[1])), np.zeros(size)
        np.add.at(total, unit, self.total)
        np.add.at(count, unit, self.count)
        return total, count, name


def resampled_means(sums: BlockSums, *, draws: int = 2000, seed: int = 0) -> Float[np.ndarray, "draws F"]:
    """The means under `draws` resamplings of the units. Equal units and seed give equal resamplings: that is the
    pairing.
    """
    total, count, _ = sums.per_unit()
    size, generator = len(count), np.random.default_rng(seed)
    means = np.empty((draws, total.shape[1]))
    step = max(1, 2**22 // max(size, 1))
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        # One row of picks for each draw, whatever the step: the stream of picks is read in order.
        picks = generator.integers(0, size, (rows, size)) + size * np.arange(rows)[:, None]
        weights = np.bincount(picks.reshape(-1), minlength=rows * size).reshape(rows, size)
        means[start : start + rows] = (weights @ total) / (weights @ count)[:, None]
    return means


def _percentiles(estimate: float, values: np.ndarray, sums: BlockSums, level: float) -> Interval:
    unit, name = sums.units()
    units = len(np.unique(unit))
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail]) if units > 1 else (np.nan, np.nan)
    return Interval(estimate=float(estimate), low=float(low), high=float(high), level=level, units=units, unit=name)


def bootstrap(
    sums: BlockSums, statistics: Sequence[Statistic], *, draws: int = 2000, seed: int = 0, level: float = 0.95
) -> list[Interval]:
    """Percentile intervals of functions of the means, all from the same resamplings. Nothing is assumed linear."""
    if not len(sums.count) or not sums.count.sum():
        raise UsageError("no scored positions: the split is shorter than one block, or every block has one chunk")
    means = resampled_means(sums, draws=draws, seed=seed)
    return [_percentiles(float(statistic(sums.means)), statistic(means), sums, level) for statistic in statistics]


def paired_bootstrap(
    first: BlockSums,
    second: BlockSums,
    statistics: Sequence[Statistic],
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval]:
    """Intervals of statistic(first) - statistic(second) on the same blocks, each resampling shared by both.

    Raises:
        UsageError: the two were not computed on the same blocks.
    """
    same = first.block_tokens == second.block_tokens and np.array_equal(first.document, second.document)
    if not same or not np.array_equal(first.count, second.count):
        raise UsageError("a paired comparison needs the same blocks and positions on both sides")
    one, two = (resampled_means(sums, draws=draws, seed=seed) for sums in (first, second))
    return [
        _percentiles(
            float(statistic(first.means)) - float(statistic(second.means)), statistic(one) - statistic(two), first, level
        )
        for statistic in statistics
    ]
