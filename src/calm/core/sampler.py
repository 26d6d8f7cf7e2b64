"""Interface of a sampler, which draws the next chunk of every row from the model, as often as it needs to, and chooses.

A sampler is a small frozen dataclass with one method, `sample`, which runs on the device for all rows at once.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from calm.errors import CalmError


class StepKeys(NamedTuple):
    """The keys of one step, one for each row and purpose. A row's depend on its own key and the step alone."""

    draw: Array
    choice: Array


@runtime_checkable
class Source(Protocol):
    """The distribution of the next chunk of every row: it can be drawn from, and says no probabilities."""

    @property
    def alive(self) -> Bool[Array, "B"]:
        """Rows that still write. What is chosen for the others goes nowhere, so nothing should be spent on them."""
        ...

    def draw(self, keys: Array, num_draws: int) -> Int[Array, "S B K"]:
        """`num_draws` independent chunks for each row, row b's from `keys[b]` alone."""
        ...

    def repeats(self, chunks: Int[Array, "S B K"], length: int) -> Bool[Array, "S B"]:
        """Whether a chunk, put after what its row has, would repeat `length` tokens in a row (`calm.core.repetition`)."""
        ...


class Choice(NamedTuple):
    """Result of a sampler."""

    chunk: Int[Array, "B K"]
    fell_back: Bool[Array, "B"]
    """true where the counts could not decide as asked, so that a lower count did"""
    draws: Int[Array, "B"]
    """chunks that each row used"""
    ran_out: Bool[Array, "B"] | None = None
    """true where the draws ran out before a chunk was accepted; none for a sampler that needs a fixed number"""
    collision_rate: Float[Array, "B"] | None = None
    """share of pairs of this step's draws that were equal; none where nobody asks"""


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


class OutOfDraws(CalmError):
    """A sampler's draws ran out before it accepted a chunk. Exit code 1.

    The message names the place, the draws used, the observed collision rate and the draws expected at that rate.

    Attributes:
        draws: chunks drawn for that one choice.
        collision_rate: share of pairs of them that were equal.
        expected_draws: what the choice needs on average, by that rate.
    """

    def __init__(self, message: str, *, draws: int, collision_rate: float, expected_draws: float):
        super().__init__(message)
        self.draws, self.collision_rate, self.expected_draws = draws, collision_rate, expected_draws
