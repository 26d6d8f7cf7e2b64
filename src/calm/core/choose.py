"""From options, as a person gives them, to a sampler."""

from fractions import Fraction

from calm.core.counts import BestOfN, Filters
from calm.core.exact import ExactTemperature
from calm.core.sampler import PlainSampler, Sampler
from calm.core.temperature import BatchTemperature, exact_temperature
from calm.errors import UsageError

KINDS = ("batch", "exact", "best")
DEFAULT_BUDGET = ExactTemperature.max_draws


def from_temperature(
    temperature: float | int | str | Fraction = 1,
    candidates: int = 200,
    *,
    kind: str = "batch",
    max_draws: int = DEFAULT_BUDGET,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    no_repeat: int | None = None,
) -> Sampler:
    """The sampler for chunks that some options ask for.

    Args:
        temperature: above 0: `1`, `0.7`, `1 / 3`, `"1/3"`, `Fraction(1, 3)`; read exactly (`exact_temperature`).
        candidates: S, the draws at each chunk of the samplers that count.
        kind: "batch", near the distribution of any T for a fixed number of draws; "exact", that distribution for T <= 1, for
            as many draws as it takes; "best", the chunk drawn most often, which takes no temperature.
        max_draws: the most draws of the exact sampler for one chunk.
        top_k, top_p, min_p: which chunks may be chosen (`Filters`); for kind "batch".
        no_repeat: no run of this many tokens is written twice (`calm.core.repetition`).
    Returns:
        At temperature 1 with nothing else asked for, the sampler that draws once.
    Raises:
        UsageError: an option out of range, or one that this kind does not have.
    """
    exact = exact_temperature(temperature)
    if candidates < 1:
        raise UsageError(f"candidates must be at least 1, got {candidates}")
    if no_repeat is not None and no_repeat < 1:
        raise UsageError(f"no_repeat must be at least 1 token, got {no_repeat}")
    filters = Filters(top_k=top_k, top_p=top_p, min_p=min_p)
    if kind not in KINDS:
        raise UsageError(f"unknown sampler {kind!r}; choose {', '.join(KINDS)}")
    if kind != "batch" and filters:
        raise UsageError(f"top_k, top_p and min_p are decided by counts: use the batch sampler, not {kind!r}")
    if kind == "best":
        if exact != 1:
            raise UsageError(f"the sampler 'best' takes the chunk drawn most often, at no temperature: leave out {temperature}")
        return BestOfN(num_candidates=candidates, no_repeat=no_repeat)
    if exact == 1 and not filters and no_repeat is None:
        return PlainSampler()
    if kind == "exact":
        return ExactTemperature(temperature=exact, max_draws=max_draws, no_repeat=no_repeat)
    return BatchTemperature(temperature=exact, num_candidates=candidates, filters=filters, no_repeat=no_repeat)
