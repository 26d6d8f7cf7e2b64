"""Exact temperature: P(chunk)^(1/T) / Z, to the letter, from draws alone."""

import dataclasses
import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from calm.core.counts import tally
from calm.core.laws import draws_by_collisions
from calm.core.sampler import Choice, OutOfDraws, Source, StepKeys
from calm.errors import UsageError

UNROLLED = 8  # draws that one pass of the compiled loop reads


class Attempt(NamedTuple):
    """Where each row stands in its stream of draws."""

    chunk: Int[Array, "B K"]
    """the first draw of this attempt, which it may accept"""
    made: Int[Array, "B"]
    """draws of this attempt so far; 0 = the next draw begins one"""
    alike: Bool[Array, "B"]
    """all of them were equal, up to the n-th"""
    refused: Bool[Array, "B"]
    """the chunk may not be written (repetition), whatever the draws say"""
    accepted: Bool[Array, "B"]
    used: Int[Array, "B"]
    """draws of all attempts"""


class Search(NamedTuple):
    """Carry of the loop over blocks of draws."""

    attempt: Attempt
    block: Int[Array, ""]
    equal: Float[Array, "B"]
    """equal pairs within blocks"""
    pairs: Float[Array, "B"]
    """all pairs within blocks"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactTemperature:
    """Samples exactly P(chunk)^(1/T) / Z for 0 < T <= 1, by rejection (exact temperature sampling, CALM, arXiv:2510.27688).

    With n = floor(1/T) and a = 1/T - n: draw n chunks; unless all are equal to one x, begin anew: this alone gives P^n. If
    a > 0, a Bernoulli factory adds the rest, for i = 1, 2, ...: draw once more; x again is acceptance; else begin anew with
    probability a / i. It accepts x with probability P(x)^a. T is a fraction, so n and a are what they should be.

    Average draws: `calm.core.laws.expected_draws`. As T -> 1 from below they grow to the number of chunks that the model
    can write, so on text T in (1/2, 1) is the expensive range. At any T < 1 a flat distribution is expensive too: equal
    draws are rare. A row that has used `max_draws` without acceptance ends generation with `OutOfDraws`: any other chunk
    would be biased.

    The published code does not have it. Draws come in blocks for all rows at once and are read one after the other, as if
    drawn one by one: the samples are exact, a row depends on its own key alone, and the unread rest of its last block is
    discarded.
    """

    temperature: Fraction = Fraction(1, 2)
    max_draws: int = 20_000
    """the most draws for one chunk of one row; whole blocks are drawn, so it may be passed by less than one"""
    block: int = 64
    """draws made at a time for every row"""
    no_repeat: int | None = None
    """never accept a chunk that would repeat this many tokens in a row (`calm.core.repetition`)"""

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= 1:
            raise UsageError(
                f"temperature {self.temperature}: exact sampling needs 0 < T <= 1; the batch sampler takes any T above 0"
            )
        if self.max_draws < 1 or self.block < 1:
            raise UsageError(f"max_draws and block must be at least 1, got {self.max_draws} and {self.block}")

    @property
    def whole(self) -> int:
        """n = floor(1/T)"""
        return math.floor(1 / self.temperature)

    @property
    def rest(self) -> Fraction:
        """a = 1/T - n, in [0, 1)"""
        return 1 / self.temperature - self.whole

    def sample(self, keys: StepKeys, source: Source) -> Choice:
        rows, width = jax.eval_shape(lambda keys: source.draw(keys, 1), keys.draw).shape[1:]
        zeros = jnp.zeros((rows,), jnp.int32)
        attempt = Attempt(jnp.zeros((rows, width), jnp.int32), zeros, zeros == 0, zeros != 0, ~source.alive, zeros)
        nothing = jnp.zeros((rows,), jnp.float32)

        def unfinished(search: Search) -> Array:
            return (~search.attempt.accepted).any() & ~self._ran_out(search.attempt).any()

        def draw_block(search: Search) -> Search:
            def of_block(key: Array) -> Array:
                return jax.random.fold_in(key, search.block)

            draws = source.draw(jax.vmap(of_block)(keys.draw), self.block)
            coins = jax.vmap(lambda key: jax.random.uniform(of_block(key), (self.block,)), out_axes=1)(keys.choice)
            refused = source.repeats(draws, self.no_repeat) if self.no_repeat else jnp.zeros(coins.shape, bool)
            # rows that are done count no more pairs, so that a row's rate does not depend on its neighbours
            waiting = (~search.attempt.accepted).astype(jnp.float32)
            counts = jax.vmap(tally, in_axes=1)(draws)
            equal = (counts * (counts - 1)).sum(-1).astype(jnp.float32)
            attempt, _ = jax.lax.scan(self._read, search.attempt, (draws, refused, coins), unroll=UNROLLED)
            pairs = self.block * (self.block - 1)
            return Search(attempt, search.block + 1, search.equal + waiting * equal, search.pairs + waiting * pairs)

        search = jax.lax.while_loop(unfinished, draw_block, Search(attempt, jnp.int32(0), nothing, nothing))
        rate = search.equal / jnp.maximum(search.pairs, 1)
        attempt = search.attempt
        return Choice(attempt.chunk, zeros != 0, attempt.used, self._ran_out(attempt), rate)

    def out_of_draws(self, place: str, draws: int, collision_rate: float) -> OutOfDraws:
        """The error for a row that ran out."""
        # without one equal pair, the rate is below that of one pair
        least = 2 / (draws * max(self.block - 1, 1))
        expected = draws_by_collisions(collision_rate or least, self.temperature)
        advice = "raise max_draws, choose another temperature, or use the batch sampler"
        return OutOfDraws(
            f"{place}: exact sampling at temperature {self.temperature} used {draws} draws without accepting a chunk "
            f"(max_draws={self.max_draws}); observed collision rate {collision_rate:.3g}, for which "
            f"{'about' if collision_rate else 'more than'} {expected:.3g} draws are expected; {advice}",
            draws=draws,
            collision_rate=collision_rate,
            expected_draws=expected,
        )

    def _ran_out(self, attempt: Attempt) -> Bool[Array, "B"]:
        return ~attempt.accepted & (attempt.used >= self.max_draws)

    def _read(self, attempt: Attempt, draw: tuple[Array, Array, Array]) -> tuple[Attempt, None]:
        """Reads the next draw of every row that has not accepted yet."""
        chunk, refused, coin = draw
        first = attempt.made == 0
        same = first | (chunk == attempt.chunk).all(-1)
        made = attempt.made + 1
        within = made <= self.whole  # the first n draws; those after are the Bernoulli factory's
        alike = jnp.where(within, (first | attempt.alike) & same, attempt.alike)
        refused = jnp.where(first, refused, attempt.refused)
        if self.rest:
            anew = jnp.where(within, (made == self.whole) & ~alike, ~same & (coin * (made - self.whole) < float(self.rest)))
            accepted = ~within & same
        else:
            anew = (made == self.whole) & ~alike
            accepted = (made == self.whole) & alike
        anew |= accepted & refused
        accepted &= ~refused
        moved = Attempt(
            chunk=jnp.where(first[:, None], chunk, attempt.chunk),
            made=jnp.where(anew, 0, made),
            alike=alike,
            refused=refused,
            accepted=accepted,
            used=attempt.used + 1,
        )

        def unless_done(old: Array, new: Array) -> Array:
            done = attempt.accepted
            return jnp.where(done.reshape(done.shape + (1,) * (old.ndim - 1)), old, new)

        return jax.tree.map(unless_done, attempt, moved), None
