"""Critics: how much a trajectory of latents is what is wanted, as a number with a slope.

A critic is anything that maps latents `[S B N Z]` to rewards `[S B]`, higher being better, each trajectory by itself: a
function of one's own, or one of those here. They are pytrees, so that one compiled program serves every concept and every
trained critic of the same sizes. One with `reads_chunks = True` is also given the chunks that were written for the latents,
`[S B N K]`, as constants (`calm.ttt.lexicon`).
"""

import dataclasses
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.errors import UsageError
from calm.rng import PRNGKey

MIN_LENGTH = 1e-2  # latents are about sqrt(Z) long; below this a cosine's slope, 1 / length, is cut


@runtime_checkable
class Critic(Protocol):
    """Rewards of trajectories."""

    def __call__(self, latents: Float[Array, "S B N Z"]) -> Float[Array, "S B"]: ...


@partial(jax.tree_util.register_dataclass, data_fields=("origin", "direction"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class ConceptCritic:
    """Closeness to a concept: the cosine between a latent, seen from the general mean, and the concept's direction, as a mean
    over the trajectory; in [-1, 1].

    The target of J. Adam's description (2025, "Calm-Seal"), which leaves open how the vector is found; see `calm.ttt.concept`.
    """

    origin: Float[Array, "Z"]
    """the mean latent of text in general"""
    direction: Float[Array, "Z"]
    """from there to the mean latent of the concept, of length 1"""

    def __call__(self, latents: Float[Array, "S B N Z"]) -> Float[Array, "S B"]:
        seen = latents - self.origin
        length = jnp.sqrt(jnp.maximum(jnp.square(seen).sum(-1), MIN_LENGTH**2))
        return (seen @ self.direction / length).mean(-1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("origin", "spread", "pairs", "pairs_bias", "inner", "inner_bias", "out", "out_bias", "temperature"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainedCritic:
    """log p(wanted | trajectory) in nats, by a small network that was trained on labelled text (`calm.ttt.training`).

    Each latent is read together with the one before it (nothing before the first), so that order is seen; what is found there
    is averaged over the trajectory, so that any length can be judged. At p near 1 the reward is near 0 and so is its slope:
    what already is as wanted is let be.
    """

    origin: Float[Array, "Z"]
    spread: Float[Array, "Z"]
    pairs: Float[Array, "2*Z W"]
    pairs_bias: Float[Array, "W"]
    inner: Float[Array, "W W"]
    inner_bias: Float[Array, "W"]
    out: Float[Array, "W"]
    out_bias: Float[Array, ""]
    temperature: Float[Array, ""]
    """by which the logit is divided: fitted on text that was not trained on (Guo et al. 2017, arXiv:1706.04599)"""

    def logit(self, latents: Float[Array, "*b N Z"], length: Int[Array, "*b"] | None = None) -> Float[Array, "*b"]:
        """Log-odds of what is wanted, calibrated; of trajectories that are shorter than N, `length` says what counts."""
        seen = (latents - self.origin) / self.spread
        before = jnp.concatenate([jnp.zeros_like(seen[..., :1, :]), seen[..., :-1, :]], axis=-2)
        found = jax.nn.silu(jnp.concatenate([before, seen], axis=-1) @ self.pairs + self.pairs_bias)
        if length is None:
            found = found.mean(-2)
        else:
            counted = jnp.arange(latents.shape[-2]) < length[..., None]
            found = (found * counted[..., None]).sum(-2) / jnp.maximum(length, 1)[..., None]
        found = found + jax.nn.silu(found @ self.inner + self.inner_bias)
        return (found @ self.out + self.out_bias) / self.temperature

    def __call__(self, latents: Float[Array, "S B N Z"]) -> Float[Array, "S B"]:
        return jax.nn.log_sigmoid(self.logit(latents))


@partial(jax.tree_util.register_dataclass, data_fields=("parts", "weights"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class CriticSum:
    """sum_i weight_i critic_i."""

    parts: tuple[Any, ...]
    weights: tuple[Any, ...]

    @property
    def reads_chunks(self) -> bool:
        return any(reads_chunks(part) for part in self.parts)

    def __call__(self, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"] | None = None) -> Float[Array, "S B"]:
        rewards = [weight * rewards_of(part, latents, chunks) for weight, part in zip(self.weights, self.parts, strict=True)]
        return sum(rewards[1:], start=rewards[0])


@partial(jax.tree_util.register_dataclass, data_fields=("critic", "order"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class ShuffledCritic:
    """A critic that sees the latents' dimensions in another order: as steep as the critic, and about nothing. A control."""

    critic: Any
    order: Int[Array, "Z"]

    @staticmethod
    def of(critic: Any, key: PRNGKey, latent_dim: int) -> "ShuffledCritic":
        return ShuffledCritic(critic, jax.random.permutation(key, latent_dim))

    @property
    def reads_chunks(self) -> bool:
        return reads_chunks(self.critic)

    def __call__(self, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"] | None = None) -> Float[Array, "S B"]:
        return rewards_of(self.critic, latents[..., self.order], chunks)


def weighted(parts: list[tuple[float, Any]]) -> Any:
    """One critic of several, each with its weight.

    Raises:
        UsageError: none at all, or a weight that is 0 or not a number.
    """
    if not parts:
        raise UsageError("critic: name a concept or a trained critic")
    for weight, _ in parts:
        if not weight or not abs(weight) < float("inf"):
            raise UsageError(f"critic: a weight must be a number other than 0, got {weight}")
    if len(parts) == 1 and parts[0][0] == 1:
        return as_pytree(parts[0][1])
    critics = tuple(as_pytree(critic) for _, critic in parts)
    return CriticSum(critics, tuple(jnp.float32(weight) for weight, _ in parts))


def reads_chunks(critic: Any) -> bool:
    """Whether it is to be given what was written for the latents."""
    return bool(getattr(critic, "reads_chunks", False))


def rewards_of(critic: Any, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"] | None) -> Any:
    """A critic's rewards of futures, whatever it gives: of their latents, and of what was written for them where it
    `reads_chunks`."""
    return critic(latents, chunks) if reads_chunks(critic) else critic(latents)


def as_pytree(critic: Any) -> Any:
    """The critic as a compiled program takes it: a function of one's own is a tree without leaves."""
    if not callable(critic):
        raise UsageError(f"critic: must be a function of latents [S B N Z], got {type(critic).__name__}")
    plain = jax.tree_util.all_leaves([critic])
    return jax.tree_util.Partial(critic) if plain else critic


def checked_rewards(critic: Any, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"]) -> Float[Array, "S B"]:
    """The critic's rewards of real trajectories.

    Raises:
        UsageError: they have the wrong shape, or are no numbers.
    """
    wanted = latents.shape[:2]
    try:
        shape = getattr(jax.eval_shape(partial(rewards_of, critic), latents, chunks), "shape", None)
    except (TypeError, ValueError) as error:
        raise UsageError(f"critic: cannot read latents [S B N Z] = {list(latents.shape)}: {error}") from error
    if shape != wanted:
        found = "no array" if shape is None else str(list(shape))
        raise UsageError(
            f"critic: gave {found} for latents {list(latents.shape)}; it must give one reward each, {list(wanted)}"
        )
    rewards = rewards_of(critic, latents, chunks)
    wrong = int((~jnp.isfinite(rewards)).sum())
    if wrong:
        raise UsageError(f"critic: {wrong} of {rewards.size} rewards are not finite numbers")
    return rewards
