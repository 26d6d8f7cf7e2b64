"""Equal chunks among the candidates, and what their counts decide: top-k, top-p, min-p, and the vote.

The filters of tokens (top-k; top-p, Holtzman et al., arXiv:1904.09751; min-p, Nguyen et al., arXiv:2407.01082) carried over to
whole chunks: the model says no probabilities, so the share of a chunk among S draws stands for its probability.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from calm.core.sampler import Choice, Source, StepKeys
from calm.errors import UsageError

EQUALITY_LIMIT = 400  # beyond, the S x S matrix of a batch outgrows the cache: at 2000 sorting is 16 times faster (CPU)


def tally(chunks: Int[Array, "S K"]) -> Int[Array, "S"]:
    """How often each chunk occurs among the S, at the place where it comes first; 0 at its other places. Exact at any size."""
    return tally_by_pairs(chunks) if chunks.shape[0] <= EQUALITY_LIMIT else tally_by_sorting(chunks)


def tally_by_pairs(chunks: Int[Array, "S K"]) -> Int[Array, "S"]:
    """`tally` by comparing all pairs: S^2 K comparisons that vectorise."""
    equal = chunks[:, None, 0] == chunks[None, :, 0]
    for place in range(1, chunks.shape[1]):
        equal &= chunks[:, None, place] == chunks[None, :, place]
    size = chunks.shape[0]
    earlier = jnp.arange(size)[:, None] > jnp.arange(size)[None, :]
    return jnp.where((equal & earlier).any(-1), 0, equal.sum(-1, dtype=jnp.int32))


def tally_by_sorting(chunks: Int[Array, "S K"]) -> Int[Array, "S"]:
    """`tally` by sorting the chunks in dictionary order, where equal ones stand side by side, the first of them first."""
    size, places = chunks.shape
    operands = (*(chunks[:, place] for place in range(places)), jnp.arange(size, dtype=jnp.int32))
    *columns, order = jax.lax.sort(operands, num_keys=places)
    in_order = jnp.stack(columns)
    begins = jnp.concatenate([jnp.ones((1,), bool), (in_order[:, 1:] != in_order[:, :-1]).any(0)])
    group = jnp.cumsum(begins.astype(jnp.int32)) - 1
    sizes = jax.ops.segment_sum(jnp.ones((size,), jnp.int32), group, num_segments=size, indices_are_sorted=True)
    return jnp.zeros((size,), jnp.int32).at[order].set(jnp.where(begins, sizes[group], 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filters:
    """Which chunks may be chosen, by their weights: after temperature, in this order, each on what the one before left.

    Chunks of equal weight are told apart by which was drawn first. Given the counts, every order of draws is as likely, so
    that is a fair coin; and the choice stays a function of the draws.
    """

    top_k: int | None = None
    """keep the k heaviest chunks"""
    top_p: float | None = None
    """keep the fewest heaviest chunks that together have at least this share of the weight"""
    min_p: float | None = None
    """keep the chunks of at least this share of the heaviest one's weight"""

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UsageError(f"{name} must be above 0 and at most 1, got {value}")

    def __bool__(self) -> bool:
        return self != Filters()

    def __call__(self, log_weights: Float[Array, "S"]) -> Float[Array, "S"]:
        """The weights, with those of chunks that are left out at -inf; at least one chunk stays."""
        if not self:
            return log_weights
        order = jnp.argsort(-log_weights, stable=True)
        weight = jnp.exp(log_weights[order] - log_weights[order[0]])
        keep = jnp.ones(order.shape, bool) if self.top_k is None else jnp.arange(order.size) < self.top_k
        if self.top_p is not None:
            left = jnp.where(keep, weight, 0.0)
            # the weight in front of a chunk is too little: the chunk is needed. The margin keeps a share that is exactly
            # top_p from being missed by rounding
            keep &= jnp.cumsum(left) - left < self.top_p * left.sum() * (1 - 1e-6)
        if self.min_p is not None:
            keep &= weight >= self.min_p * (1 - 1e-6)
        return jnp.where(jnp.zeros(order.shape, bool).at[order].set(keep), log_weights, -jnp.inf)


def without_repeats(counts: Int[Array, "S"], repeated: Bool[Array, "S"] | None) -> tuple[Int[Array, "S"], Bool[Array, ""]]:
    """Counts with repeating chunks taken as not drawn; where that leaves none, all counts, and true."""
    if repeated is None:
        return counts, jnp.zeros((), bool)
    left = jnp.where(repeated, 0, counts)
    stuck = ~(left > 0).any()
    return jnp.where(stuck, counts, left), stuck


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The chunk drawn most often among S: the limit T -> 0, where the draws decide which chunk is most probable.

    Chunks of equal count: the one drawn first. Steps at which all draws differ, so that nothing was voted, count as fallbacks.
    """

    num_candidates: int = 200
    """S, chunks drawn per step"""
    no_repeat: int | None = None
    """leave out chunks that would repeat this many tokens in a row (`calm.core.repetition`)"""

    def __post_init__(self) -> None:
        if self.num_candidates < 1:
            raise UsageError(f"candidates must be at least 1, got {self.num_candidates}")

    def sample(self, keys: StepKeys, source: Source) -> Choice:
        candidates = source.draw(keys.draw, self.num_candidates)
        repeated = source.repeats(candidates, self.no_repeat) if self.no_repeat else None
        counts = jax.vmap(tally, in_axes=1)(candidates)
        counts, stuck = jax.vmap(without_repeats)(counts, None if repeated is None else repeated.T)
        undecided = (counts.max(-1) == 1) if self.num_candidates > 1 else jnp.zeros(stuck.shape, bool)
        return chosen(candidates, jnp.argmax(counts, axis=-1), undecided | stuck)


def chosen(candidates: Int[Array, "S B K"], index: Int[Array, "B"], fell_back: Bool[Array, "B"]) -> Choice:
    """The choice of one of S candidates for each row."""
    chunk = jnp.take_along_axis(candidates, index[None, :, None], axis=0)[0]
    return Choice(chunk, fell_back, jnp.full(index.shape, candidates.shape[0], jnp.int32))
