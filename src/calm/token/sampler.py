"""Sampling from known probabilities: temperature and the usual filters, for models that have a softmax."""

import dataclasses
from fractions import Fraction
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from calm.core.sampler import Choice, Source, StepKeys
from calm.core.temperature import exact_temperature
from calm.core.vocabulary import draw_places
from calm.errors import UsageError


@runtime_checkable
class SourceWithLogits(Protocol):
    """A source that says probabilities."""

    def logits(self) -> Float[Array, "B V"]:
        """Logits of every row's next token; minus infinity for banned ones."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxSampler:
    """Draws the next token from softmax(logits / T), cut by filters in this order, each on what the one before it left.

    Tokens as probable as the last one that a filter keeps are kept as well. For chunks, whose probabilities nobody knows,
    `calm.core.counts.Filters` estimates the same filters from counts.
    """

    temperature: float = 1.0
    """T > 0"""
    top_k: int = 0
    """keep the k most probable tokens; 0 = all"""
    top_p: float = 1.0
    """keep the fewest tokens whose probabilities add up to p (nucleus sampling, arXiv:1904.09751); 1 = all"""
    min_p: float = 0.0
    """keep tokens at least this many times as probable as the most probable one (arXiv:2407.01082); 0 = all"""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"temperature must be a number above 0, got {self.temperature}; top_k=1 takes the most probable")
        if self.top_k < 0:
            raise UsageError(f"top_k must be at least 1, or 0 for all tokens, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must lie in [0, 1], got {self.min_p}")

    def sample(self, keys: StepKeys, source: Source) -> Choice:
        if not isinstance(source, SourceWithLogits):
            raise UsageError("this sampler needs probabilities, which only a token model has; use one that draws")
        weights = self.weights(source.logits())
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (1, 2)))(keys.choice)
        chunk = draw_places(uniforms, weights).astype(jnp.int32)
        return Choice(chunk, jnp.zeros(chunk.shape[:1], bool), jnp.ones(chunk.shape[:1], jnp.int32))

    def weights(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Numbers proportional to the probabilities that it draws with."""
        logits = logits / self.temperature
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        return jnp.where(self.kept(weights), weights, 0.0)

    def kept(self, weights: Float[Array, "B V"]) -> Bool[Array, "B V"]:
        """Which tokens the filters leave, given numbers proportional to their probabilities."""
        least = self.min_p * weights.max(-1, keepdims=True)
        if self.top_k or self.top_p < 1:
            in_order = jnp.sort(weights, axis=-1, descending=True)
            if self.top_k:
                in_order = jnp.where(jnp.arange(in_order.shape[-1]) < self.top_k, in_order, 0.0)
            before = jnp.cumsum(in_order, axis=-1) - in_order
            inside = (in_order > 0) & (before < self.top_p * in_order.sum(-1, keepdims=True))
            least = jnp.maximum(least, jnp.where(inside, in_order, jnp.inf).min(-1, keepdims=True))
        return weights >= least


def softmax_sampler(
    temperature: float | int | str | Fraction = 1,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> SoftmaxSampler:
    """The sampler that some options ask for: temperatures as in `calm.core.choose.from_temperature`, none = no filter."""
    return SoftmaxSampler(
        temperature=float(exact_temperature(temperature)), top_k=top_k or 0, top_p=top_p or 1.0, min_p=min_p or 0.0
    )
