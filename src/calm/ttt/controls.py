"""Controls: what else could have raised the reward, each by the same command and, where it costs, at the same FLOPs.

shuffled reward     the same adaptation by a critic that sees the latents' dimensions in another order
random direction    a change of the weights as long as the adapted one in every weight, in a random direction
best of S           no change: as many texts as the FLOPs of adaptation pay for, the best of which the critic picks
steering            no change: the concept's direction is added to every latent, as long as adaptation moved them
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from calm.ttt import fast_weights
from calm.ttt.critic import ConceptCritic, rewards_of
from calm.ttt.fast_weights import Change


def random_changes(keys: Array, changes: Change) -> Change:
    """For each prompt a change in a random direction, as long as its own in every weight."""
    return jax.vmap(fast_weights.random_like)(keys, jax.tree.map(jnp.asarray, changes))


def directions(
    critic: Any, latents: Float[np.ndarray, "B S N Z"], chunks: Int[np.ndarray, "B S N K"]
) -> Float[np.ndarray, "B Z"]:
    """Which way all latents of a prompt's texts would have to move for the reward to rise most, of length 1.

    For a concept that is its direction; for other critics the slope of the reward at the texts at hand.
    """
    if isinstance(critic, ConceptCritic):
        return np.broadcast_to(np.asarray(critic.direction), (len(latents), latents.shape[-1]))

    def reward(shift: Float[Array, "B Z"]) -> Float[Array, ""]:
        moved = jnp.swapaxes(jnp.asarray(latents) + shift[:, None, None], 0, 1)
        return rewards_of(critic, moved, jnp.swapaxes(jnp.asarray(chunks), 0, 1)).mean()

    slope = np.asarray(jax.grad(reward)(jnp.zeros((len(latents), latents.shape[-1]))))
    return slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-12)


def moved(standard: Float[np.ndarray, "B S N Z"], aligned: Float[np.ndarray, "B S N Z"]) -> Float[np.ndarray, "B"]:
    """How far the mean latent of each prompt's texts went."""
    return np.linalg.norm(aligned.mean((1, 2)) - standard.mean((1, 2)), axis=-1)
