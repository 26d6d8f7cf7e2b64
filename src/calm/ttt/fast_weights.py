"""Fast weights: a change of a language model's weights for one prompt, discarded afterwards.

A change is a tree of its own, keyed by the names of the weights that it changes. The model's own weights are never written,
so nothing has to be restored. Changes of many prompts have a leading axis B and are added inside `vmap`, each prompt with
its own.

The name is Schmidhuber's (1992): weights that live for one sequence beside slow ones that live for the training. Low-rank
changes are those of LoRA (Hu et al. 2021, arXiv:2106.09685).
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from calm.errors import UsageError
from calm.rng import PRNGKey, stream
from calm.train.trees import map_named, named_leaves

Part = Literal["head", "all"]
FOLDERS: dict[str, tuple[str, ...]] = {
    "head": ("lm.head.",),
    "all": ("lm.head.", "lm.backbone.", "lm.stem."),
}
"""Prefixes of the names of a `NextVector`'s weights. The autoencoder defines the latents and is not changed; no gradient of a
reward on latents reaches a context decoder."""


class Factors(NamedTuple):
    """A change of rank r of a kernel `[*l X Y]`: left @ right."""

    left: Float[Array, "*l X r"]
    right: Float[Array, "*l r Y"]


Change = dict[str, Any]
"""Name of a weight -> what is added to it: an array of its shape, or `Factors`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastWeightsConfig:
    """Weights that may change for a prompt, and the rank of the change."""

    part: Part = "head"
    """head: a prompt is read once; all: stem, backbone and head, and the prompt is read at every step"""
    rank: int = 0
    """0 = all weights change freely; else only kernels, each by a product of two matrices of this rank"""

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= 1024:
            raise UsageError(f"fast weights: rank must lie in 0 .. 1024, got {self.rank}")

    def names(self, params: Any) -> list[str]:
        """Names of the weights that change, among those of a `NextVector`."""
        found = [name for name in named_leaves(params) if name.startswith(FOLDERS[self.part])]
        return [name for name in found if not self.rank or name.split(".")[-1] == "kernel"]

    def init(self, params: Any, key: PRNGKey) -> Change:
        """The zero change.

        Left factors are normal with variance 1 / r and right ones zero: the first step changes a kernel by the full gradient
        times left left^T, whose mean is the identity, so one rate suits all ranks.
        """
        leaves, change = named_leaves(params), {}
        for number, name in enumerate(self.names(params)):
            *lead, rows, columns = (1, *leaves[name].shape)[-max(2, leaves[name].ndim) :]
            if not self.rank:
                change[name] = jnp.zeros(leaves[name].shape, jnp.float32)
                continue
            left = jax.random.normal(stream(key, "fast weights", number), (*lead, rows, self.rank)) * self.rank**-0.5
            change[name] = Factors(left, jnp.zeros((*lead, self.rank, columns), jnp.float32))
        return change

    def size(self, params: Any) -> int:
        """Number of parameters of a change."""
        change = jax.eval_shape(lambda: self.init(params, jax.random.key(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(change))


def whole(change: Any) -> Float[Array, "*shape"]:
    """The array that is added to a weight."""
    if isinstance(change, Factors):
        return jnp.matmul(change.left, change.right, precision=jax.lax.Precision.HIGHEST)
    return change


def adapted(params: Any, change: Change) -> Any:
    """The weights with the change added; `params` are not modified."""
    return map_named(lambda name, leaf: leaf + whole(change[name]) if name in change else leaf, params)


def norm(change: Change) -> Float[Array, ""]:
    """Euclidean length of the whole change; its gradient at 0 is 0, where that of a plain root is not finite."""
    squares = sum(jnp.square(whole(each)).sum() for each in change.values())
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def step_length(change: Change, step: Change) -> Float[Array, ""]:
    """Length of the weights' movement, to first order, when `step` is added to `change`."""

    def first_order(change: Any, step: Any) -> Any:
        if not isinstance(change, Factors):
            return step
        return whole(Factors(step.left, change.right)) + whole(Factors(change.left, step.right))

    return norm({name: first_order(change[name], step[name]) for name in change})


def weights_norm(params: Any, change: Change) -> Float[Array, ""]:
    """Euclidean length of the weights that the change applies to, the unit of its own length."""
    leaves = named_leaves(params)
    return jnp.sqrt(sum(jnp.square(leaves[name]).sum() for name in change))


def scaled(change: Change, factor: Float[Array, ""]) -> Change:
    """The change times a number."""
    return {
        name: Factors(each.left, factor * each.right) if isinstance(each, Factors) else factor * each
        for name, each in change.items()
    }


def projected(change: Change, limit: Float[Array, ""]) -> Change:
    """The change, rescaled to length `limit` where it is longer."""
    length = norm(change)
    return scaled(change, jnp.where(length > limit, limit / jnp.where(length > 0, length, 1.0), 1.0))


def random_like(key: PRNGKey, change: Change) -> Change:
    """A change in a random direction, of the length of `change` in every weight; a control for any change of that size."""
    found = {}
    for number, (name, each) in enumerate(change.items()):
        own = whole(each)
        noise = jax.random.normal(stream(key, "random direction", number), own.shape)
        length = jnp.sqrt(jnp.square(own).sum() / jnp.square(noise).sum())
        found[name] = noise * length
    return found
