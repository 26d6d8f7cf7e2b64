"""Taps: one explicit hook `(name, layer, value) -> value` that reads or replaces what passes through a backbone.

It is the identity by default, and a pure function: it goes through scans and jit, and what it is to remember is passed out
by return (`Backbone.readings`). Inside a scan `layer` is a traced number, so that a tap that means one layer says
`jnp.where(layer == 3, ..., value)`. The names, with the shape of the value (P paths of a group):

    input.S     [B N D]   what the path of letter S reads
    path.S      [B N D]   what it gives, before its share
    gate        [B N P]   the shares of a group's paths, in the order of its letters; they sum to 1
    controller  [B N X]   of a `SegmentReasoner`: the bias of all gates of the segment that comes; `layer` is its first
    hidden      [B N D]   what a layer leaves behind

Layers count from 0; those of a reasoner's second segment go on where the first's ended, since its stack runs twice.

What is masked or shuffled here is masked at inference: the model was trained with all of it and falls far out of what it knows.
That answers what a trained model relies on. What a path is worth is another question, answered by training without it
(a `BackboneConfig.pattern` that lacks the letter).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from calm.errors import UsageError
from calm.rng import PRNGKey

Tap = Callable[[str, Any, Array], Array]
M = TypeVar("M", bound=nnx.Module)


def chain(*taps: Tap) -> Tap:
    """One tap after the other."""

    def tap(name: str, layer: Any, value: Array) -> Array:
        for each in taps:
            value = each(name, layer, value)
        return value

    return tap


def mask_paths(groups: Sequence[str], letters: str, *, renormalise: bool) -> Tap:
    """Takes the paths of these letters out of every layer.

    Args:
        groups: `BackboneConfig.groups`.
        renormalise: the shares that are left are scaled to sum to 1 again; else what the paths would have given is missing.

    Raises:
        UsageError: a letter that no group has; every path of a group masked where the rest is to be renormalised.
    """
    if missing := set(letters) - set("".join(groups)):
        raise UsageError(f"mask: no path {', '.join(sorted(missing))} in pattern {','.join(groups)!r}")
    if not renormalise:
        names = {f"path.{letter}" for letter in letters}
        return lambda name, layer, value: jnp.zeros_like(value) if name in names else value
    kept = np.zeros((len(groups), max(map(len, groups))), np.float32)
    for row, group in zip(kept, groups, strict=True):
        row[: len(group)] = [letter not in letters for letter in group]
        if not row.any():
            raise UsageError(f"mask: nothing is left of group {group!r} to renormalise; use renormalise=False")

    def tap(name: str, layer: Any, value: Array) -> Array:
        if name != "gate":
            return value
        value = value * jnp.asarray(kept)[layer % len(groups), : value.shape[-1]]
        return value / value.sum(-1, keepdims=True)

    return tap


def shuffle_input(letter: str, order: Int[Array, "N"]) -> Tap:
    """The path of this letter reads the positions of a whole sequence in another order: it keeps what a text is made of and
    loses where it stands. Positions then read their future: never for a model that is to be scored as one.
    """
    return lambda name, layer, value: value[:, order] if name == f"input.{letter}" else value


def replace_controller(kind: str, key: PRNGKey | None = None) -> Tap:
    """Replaces a reasoner's controller.

    Args:
        kind: "zero": no bias, so that every segment equals the first. "shuffled": the bias of another position, of any row.
            "random": normal noise with the mean and the standard deviation that each gate's bias has over the block.
        key: for the last two.
    """
    if kind not in ("zero", "shuffled", "random"):
        raise UsageError(f"controller: kind must be zero, shuffled or random, got {kind!r}")
    if kind != "zero" and key is None:
        raise UsageError(f"controller: kind {kind!r} needs a key")

    def tap(name: str, layer: Any, value: Array) -> Array:
        if name != "controller":
            return value
        if kind == "zero":
            return jnp.zeros_like(value)
        assert key is not None
        of_segment = jax.random.fold_in(key, layer)
        flat = value.reshape(-1, value.shape[-1])
        if kind == "shuffled":
            return jax.random.permutation(of_segment, flat).reshape(value.shape)
        return flat.mean(0) + flat.std(0) * jax.random.normal(of_segment, value.shape)

    return tap


def tapped(module: M, tap: Tap) -> M:
    """A copy of `module` whose backbone has this tap wherever it is called: what generates or evaluates it need not know."""
    module = nnx.merge(*nnx.split(module))
    backbones: list[Any] = [child for _, child in nnx.iter_modules(module) if hasattr(child, "tap")]
    if not backbones:
        raise UsageError("tap: the module has no backbone")
    for backbone in backbones:
        backbone.tap = tap
    return module
