"""Temperature without likelihoods: P(chunk)^(1/T) from how often each chunk was drawn.

T is a fraction throughout. In floats 1 / (1/49) is not 49, and whether 1/T is whole decides what a sampler does.
"""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from calm.core.counts import Filters, chosen, tally, without_repeats
from calm.core.sampler import Choice, Source, StepKeys
from calm.errors import UsageError
from calm.rng import PRNGKey


def exact_temperature(temperature: float | int | str | Fraction) -> Fraction:
    """T as a fraction: `"1/3"`, `"0.7"` and `Fraction` as they are, a float as the number that it is printed as.

    A float that is the one nearest to 1/n is 1/n: 1 / 3 is one third, though it prints as 0.3333333333333333.

    Raises:
        UsageError: not a number, or not above 0.
    """
    try:
        if isinstance(temperature, str) and "/" not in temperature:
            temperature = float(temperature)
        exact = Fraction(repr(float(temperature)) if isinstance(temperature, float) else temperature)
        value = float(exact)
    except (ValueError, OverflowError, ZeroDivisionError) as error:
        raise UsageError(f"temperature {temperature}: not a number; give one above 0, such as 0.7 or 1/3") from error
    if exact <= 0:
        raise UsageError(f"temperature {temperature}: must be above 0, such as 0.7 or 1/3; best-of-N is the limit of 0")
    nearest = Fraction(1, max(1, round(1 / exact)))
    return nearest if isinstance(temperature, float) and float(nearest) == value else exact


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchTemperature:
    """Samples near P(chunk)^(1/T) / Z from S draws a step, for any T > 0 (batch temperature sampling, CALM, arXiv:2510.27688).

    With b = 1/T, a chunk drawn c times weighs the generalised binomial coefficient C(c, b) = Gamma(c+1) / (Gamma(b+1)
    Gamma(c-b+1)), provided c > b - 1; at b = n this is the number of ways to pick the chunk n times without replacement, the
    published rule. If no count is above b - 1, then b - 1, b - 2, ... are tried; the first that succeeds leaves the largest
    count alone, so that step chooses evenly among the chunks of largest count, and is reported as a fallback.

    Biased at finite S, consistent (docs/sampling.md has the bias by enumeration). Above T = 1 all weights are positive and
    nothing falls back, but a chunk that was not drawn cannot be chosen, and where all draws differ it is as at T = 1.
    The published code has T = 1/n only, on the host; here it stays on the device.
    """

    temperature: Fraction = Fraction(1, 2)
    num_candidates: int = 200
    """S, chunks drawn per step"""
    filters: Filters = Filters()
    no_repeat: int | None = None
    """leave out chunks that would repeat this many tokens in a row (`calm.core.repetition`)"""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UsageError(f"temperature {self.temperature}: must be above 0")
        if not 1 / self.temperature - 1 < self.num_candidates:
            needed = math.ceil(1 / self.temperature)
            message = f"temperature {self.temperature} needs candidates >= {needed}, got candidates={self.num_candidates}"
            raise UsageError(message)

    def sample(self, keys: StepKeys, source: Source) -> Choice:
        candidates = source.draw(keys.draw, self.num_candidates)
        repeated = source.repeats(candidates, self.no_repeat) if self.no_repeat else None
        index, fell_back = jax.vmap(self.choose)(
            keys.choice, candidates.swapaxes(0, 1), None if repeated is None else repeated.T
        )
        return chosen(candidates, index, fell_back)

    def choose(
        self, key: PRNGKey, candidates: Int[Array, "S K"], repeated: Bool[Array, "S"] | None = None
    ) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        """For one row: the place of the chosen candidate, and whether it fell back."""
        counts, stuck = without_repeats(tally(candidates), repeated)
        weights = self.filters(log_weights(counts, self.temperature, self.num_candidates))
        index = jax.random.categorical(key, weights).astype(jnp.int32)
        return index, stuck | falls_back(counts, self.temperature)


def falls_back(counts: Int[Array, "*b X"], temperature: Fraction) -> Bool[Array, "*b"]:
    """Whether no count along the last axis is above 1/T - 1."""
    return counts.max(-1) <= math.floor(1 / temperature - 1)


def log_weights(counts: Int[Array, "*b X"], temperature: Fraction, num_candidates: int) -> Float[Array, "*b X"]:
    """Log weight of chunks that were drawn `counts` times among `num_candidates`: log C(count, 1/T), -inf where it has none.

    If no count along the last axis is above 1/T - 1, the chunks of largest count weigh the same. Count 0 weighs nothing.
    """
    power = 1 / temperature
    least = max(1, math.floor(power - 1) + 1)  # the smallest count above 1/T - 1
    b = float(power)
    table = np.full(num_candidates + 1, -np.inf)
    for count in range(least, num_candidates + 1):
        table[count] = math.lgamma(count + 1.0) - math.lgamma(b + 1.0) - math.lgamma(float(count - power + 1))
    largest = counts.max(-1, keepdims=True)
    fallback = jnp.where(counts == largest, 0.0, -jnp.inf)
    return jnp.where(largest >= least, jnp.asarray(table, jnp.float32)[counts], fallback)
