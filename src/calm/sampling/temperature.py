"""Temperature without likelihoods: samplers that choose among candidate chunks by how often each was drawn.

A sampler is a small frozen dataclass with one method, `sample`, which runs on the device for all rows at once and draws from
the model as often as it needs to.
"""

import dataclasses
import math
from fractions import Fraction
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from calm.errors import UsageError
from calm.rng import PRNGKey

EQUALITY_LIMIT = 400  # beyond, the S x S matrix of a batch outgrows the cache: at 2000 sorting is 16 times faster (CPU)


class StepKeys(NamedTuple):
    """The keys of one step, one for each row and purpose. A row's depend on its own key and the step alone."""

    draw: Array
    choice: Array


@runtime_checkable
class Source(Protocol):
    """The law of the next chunk of every row: it can be drawn from, and says no probabilities."""

    def draw(self, keys: Array, num_draws: int) -> Int[Array, "S B K"]:
        """`num_draws` independent chunks for each row, row b's from `keys[b]` alone."""
        ...


class Choice(NamedTuple):
    """What a sampler decided."""

    chunk: Int[Array, "B K"]
    fell_back: Bool[Array, "B"]
    """true where no chunk was drawn often enough, so that a lower count decided"""
    draws: Int[Array, "B"]
    """chunks drawn for each row"""


@runtime_checkable
class Sampler(Protocol):
    """Chooses the next chunk of every row by drawing from the model."""

    def sample(self, keys: StepKeys, source: Source) -> Choice: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainSampler:
    """T = 1: one chunk is drawn."""

    def sample(self, keys: StepKeys, source: Source) -> Choice:
        chunk = source.draw(keys.draw, 1)[0]
        return Choice(chunk, jnp.zeros(chunk.shape[:1], bool), jnp.ones(chunk.shape[:1], jnp.int32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTemperature:
    """Samples near P(chunk)^n / Z, that is T = 1/n, from draws alone (CALM, arXiv:2510.27688; its N is our S).

    Of S candidates, a chunk drawn c times weighs C(c, n): the number of ways to draw it n times in a row without replacement.
    If no chunk came n times, n - 1, n - 2, ... 1 are tried; the first that succeeds is the largest count itself, so that step
    chooses evenly among the chunks of largest count, and is reported as a fallback. Biased for finite S, consistent: at
    P = (.4, .3, .2, .1) and T = 1/2 the total variation to the target is .034 / .009 / .002 for S = 10 / 50 / 200. n is kept as
    an integer, because a float T fails: 1 / (1/49) is not 49. The published code does this on the host; here it stays on the
    device.
    """

    n: int = 2
    """1 / T"""
    num_candidates: int = 200
    """S, chunks drawn per step"""

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.num_candidates:
            message = f"temperature 1/{self.n} needs 1 <= {self.n} <= candidates, got candidates={self.num_candidates}"
            raise UsageError(message)

    def sample(self, keys: StepKeys, source: Source) -> Choice:
        candidates = source.draw(keys.draw, self.num_candidates)
        index, fell_back = jax.vmap(self.choose, in_axes=(0, 1))(keys.choice, candidates)
        chunk = jnp.take_along_axis(candidates, index[None, :, None], axis=0)[0]
        return Choice(chunk, fell_back, jnp.full(chunk.shape[:1], self.num_candidates, jnp.int32))

    def choose(self, key: PRNGKey, candidates: Int[Array, "S K"]) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        """For one row: the place of the chosen candidate, and whether no chunk came n times."""
        counts = count_equal(candidates)
        index = jax.random.categorical(key, log_weights(counts, self.n, self.num_candidates)).astype(jnp.int32)
        return index, counts.max() < self.n


def from_temperature(temperature: float | int | str | Fraction, candidates: int = 200) -> PlainSampler | BatchTemperature:
    """The sampler of T = 1 or T = 1/n: `1`, `0.5`, `1 / 3`, `"1/3"`, `Fraction(1, 3)`.

    A float counts as 1/n only if it is the float nearest to 1/n. Another T raises UsageError with the nearest allowed ones.
    """
    try:
        exact = Fraction(temperature)
        value = float(exact)
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise UsageError(f"temperature {temperature}: not a number; use 1 or 1/n for a whole n, such as 0.5") from error
    if candidates < 1:
        raise UsageError(f"candidates must be at least 1, got {candidates}")
    if exact <= 0:
        raise UsageError(f"temperature {temperature}: must be above 0; use 1 or 1/n for a whole n, such as 0.5")
    nearest = max(1, round(1 / exact))
    if exact not in (Fraction(1, nearest), Fraction(1 / nearest)):
        lower = math.floor(1 / exact)
        if not lower:
            raise UsageError(f"temperature {value:g} is above 1; the nearest allowed is 1")
        options = f"{Fraction(1, lower)} or {Fraction(1, lower + 1)}"
        raise UsageError(f"temperature {value:g} is not 1/n for a whole n; the nearest allowed are {options}")
    return PlainSampler() if nearest == 1 else BatchTemperature(n=nearest, num_candidates=candidates)


def log_weights(counts: Int[Array, "*b X"], n: int, num_candidates: int) -> Float[Array, "*b X"]:
    """Log weight of one copy of a chunk that was drawn `counts` times, so that its copies together weigh C(count, n).

    If no count along the last axis reaches n, all copies of the chunks of largest count weigh the same.
    """
    table = np.full(num_candidates + 1, -np.inf)
    log_factorial = np.array([math.lgamma(c + 1.0) for c in range(num_candidates + 1)])
    drawn = np.arange(n, num_candidates + 1)
    table[n:] = log_factorial[drawn] - log_factorial[n] - log_factorial[drawn - n] - np.log(drawn)
    largest = counts.max(-1, keepdims=True)
    fallback = jnp.where(counts == largest, 0.0, -jnp.inf)
    return jnp.where(largest >= n, jnp.asarray(table, jnp.float32)[counts], fallback)


def count_equal(chunks: Int[Array, "S K"]) -> Int[Array, "S"]:
    """How many of the S chunks equal each one, itself included; exact at any size."""
    return count_by_pairs(chunks) if chunks.shape[0] <= EQUALITY_LIMIT else count_by_sorting(chunks)


def count_by_pairs(chunks: Int[Array, "S K"]) -> Int[Array, "S"]:
    """`count_equal` by comparing all pairs: S^2 K comparisons that vectorise."""
    equal = chunks[:, None, 0] == chunks[None, :, 0]
    for place in range(1, chunks.shape[1]):
        equal &= chunks[:, None, place] == chunks[None, :, place]
    return equal.sum(-1, dtype=jnp.int32)


def count_by_sorting(chunks: Int[Array, "S K"]) -> Int[Array, "S"]:
    """`count_equal` by sorting the chunks in dictionary order, where equal ones stand side by side."""
    size, places = chunks.shape
    operands = (*(chunks[:, place] for place in range(places)), jnp.arange(size, dtype=jnp.int32))
    *columns, order = jax.lax.sort(operands, num_keys=places)
    in_order = jnp.stack(columns)
    changes = (in_order[:, 1:] != in_order[:, :-1]).any(0)
    group = jnp.cumsum(jnp.concatenate([jnp.zeros((1,), jnp.int32), changes.astype(jnp.int32)]))
    sizes = jax.ops.segment_sum(jnp.ones((size,), jnp.int32), group, num_segments=size, indices_are_sorted=True)
    return jnp.zeros((size,), jnp.int32).at[order].set(sizes[group])
