"""Critics: differentiable rewards of trajectories of latents, and their folders.

A critic maps latents `[S B N Z]` to rewards `[S B]`, higher being better, each trajectory by itself: any function, or one
of those here. They are pytrees, so that one compiled program serves all concepts and trained critics of the same sizes.
One with `reads_chunks = True` also receives the chunks written for the latents, `[S B N K]`, as constants
(`calm.ttt.lexicon`).

In a folder critic.json is the description and critic.safetensors holds the arrays, never a pickle. A critic belongs to the
latents of one autoencoder, whose fingerprint it holds, and is refused for another.
"""

import dataclasses
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from calm.core.autoencoder import Autoencoder
from calm.errors import CalmError, UsageError
from calm.rng import PRNGKey
from calm.text.atomic_write import write_whole
from calm.train.trees import named_leaves

MIN_LENGTH = 1e-2  # latents are about sqrt(Z) long; below this a cosine's slope, 1 / length, is cut


@runtime_checkable
class Critic(Protocol):
    """Rewards of trajectories."""

    def __call__(self, latents: Float[Array, "S B N Z"]) -> Float[Array, "S B"]: ...


@partial(jax.tree_util.register_dataclass, data_fields=("origin", "direction"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class DirectionCritic:
    """Mean cosine along the trajectory, in [-1, 1], between the latent's offset from the general mean and a direction.

    The critic of J. Adam's description (2025, "Calm-Seal"), which does not define the direction; see `calm.ttt.concept`.
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
    """log p(wanted | trajectory) in nats, by a small network trained on labelled text (`calm.ttt.critic_training`).

    Features of pairs of neighbouring latents (zeros before the first) are averaged over the trajectory, so order matters
    and any length can be judged. At p near 1 reward and gradient are near 0.
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
    """divisor of the logit, fitted on held-out text (Guo et al. 2017, arXiv:1706.04599)"""

    def logit(self, latents: Float[Array, "*b N Z"], length: Int[Array, "*b"] | None = None) -> Float[Array, "*b"]:
        """Calibrated log-odds of the wanted class; only the first `length` latents of a trajectory count, None = all."""
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
    """A critic of latents with permuted dimensions, as steep as the critic and unrelated to its aim; a control."""

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
    """Weighted sum of critics.

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
    """Whether a critic takes the chunks written for the latents."""
    return bool(getattr(critic, "reads_chunks", False))


def rewards_of(critic: Any, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"] | None) -> Any:
    """Unchecked rewards of a critic for futures, given their chunks where it `reads_chunks`."""
    return critic(latents, chunks) if reads_chunks(critic) else critic(latents)


def as_pytree(critic: Any) -> Any:
    """The critic as a pytree; a plain function becomes one without leaves."""
    if not callable(critic):
        raise UsageError(f"critic: must be a function of latents [S B N Z], got {type(critic).__name__}")
    plain = jax.tree_util.all_leaves([critic])
    return jax.tree_util.Partial(critic) if plain else critic


def checked_rewards(critic: Any, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"]) -> Float[Array, "S B"]:
    """Rewards of real trajectories.

    Raises:
        UsageError: rewards of the wrong shape, or not finite.
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


# -- files ------------------------------------------------------------------------------------------------------------

DESCRIPTION, ARRAYS = "critic.json", "critic.safetensors"
KINDS: dict[str, type] = {"concept": DirectionCritic, "trained": TrainedCritic}


def fingerprint(autoencoder: Autoencoder) -> str:
    """Hash of an autoencoder's weights, 16 hex digits."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(nnx.state(autoencoder, nnx.Param)).items()):
        digest.update(name.encode() + np.ascontiguousarray(np.asarray(leaf, np.float32)).tobytes())
    return digest.hexdigest()[:16]


def save_critic(
    critic: DirectionCritic | TrainedCritic, folder: str | Path, autoencoder: Autoencoder, **facts: Any
) -> dict[str, Any]:
    """Writes a critic to a folder and returns its description, which includes `facts`."""
    folder = Path(folder)
    kind = next(name for name, cls in KINDS.items() if isinstance(critic, cls))
    description = {"kind": kind, "autoencoder": fingerprint(autoencoder), "latent_dim": autoencoder.config.latent_dim, **facts}
    arrays = {field.name: np.asarray(getattr(critic, field.name), np.float32) for field in dataclasses.fields(critic)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: np.atleast_1d(array) for name, array in arrays.items()}, folder / (ARRAYS + ".tmp"))
        (folder / (ARRAYS + ".tmp")).chmod(0o644)
        (folder / (ARRAYS + ".tmp")).replace(folder / ARRAYS)
        write_whole(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise CalmError(f"{folder}: cannot write the critic ({error})") from error
    return description


def load_critic(folder: str | Path, autoencoder: Autoencoder) -> tuple[DirectionCritic | TrainedCritic, dict[str, Any]]:
    """Loads a critic for the latents of this autoencoder, and its description.

    Raises:
        UsageError: no critic there, damaged files, or one that was made for another autoencoder.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file() or not (folder / ARRAYS).is_file():
        raise UsageError(f"critic {folder}: holds no {DESCRIPTION} and {ARRAYS}; `calm train critic` makes them")
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        cls = KINDS[description["kind"]]
        arrays = load_file(folder / ARRAYS)
        scalars = ("out_bias", "temperature")
        fields = {
            field.name: jnp.asarray(arrays[field.name][0] if field.name in scalars else arrays[field.name])
            for field in dataclasses.fields(cls)
        }
        made_for = description["autoencoder"]
    except (ValueError, KeyError, TypeError, IndexError, OSError, SafetensorError) as error:
        raise UsageError(f"critic {folder}: damaged ({type(error).__name__}: {error})") from error
    if made_for != fingerprint(autoencoder):
        raise UsageError(
            f"critic {folder}: made for the latents of another autoencoder (fingerprint {made_for}, the model's is "
            f"{fingerprint(autoencoder)}); train it with --autoencoder on the model's run"
        )
    return cls(**fields), description
