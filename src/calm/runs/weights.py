"""A model as a flat mapping of dotted names to arrays, and back, bit for bit."""

from collections.abc import Mapping
from typing import Protocol, TypeVar, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm.core.dense import Precision
from calm.errors import UsageError

Model = TypeVar("Model", bound=nnx.Module, covariant=True)


@runtime_checkable
class Buildable(Protocol[Model]):
    """A configuration of a model."""

    def build(self, *, rngs: nnx.Rngs, precision: Precision) -> Model: ...


def flat_weights(model: nnx.Module) -> dict[str, np.ndarray]:
    """Every weight of `model` under its dotted name, such as `backbone.blocks.layer.mlp.down.kernel` `[layers I D]`."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(variable[...], order="C") for path, variable in flat}


def build_with_weights(
    config: Buildable[Model], weights: Mapping[str, np.ndarray], *, precision: Precision = "float32", where: str
) -> Model:
    """The model of `config` with these weights and no others; `where` is the file that errors name.

    Nothing is initialised on the way. Arrays of 16 bits become float32.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0), precision=precision)))
    flat, left = [], dict(weights)
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if name not in left:
            raise UsageError(f"{where}: weight {name!r} is missing")
        array, shape = left.pop(name), variable.get_value().shape
        if array.shape != shape:
            raise UsageError(f"{where}: weight {name!r} has shape {array.shape}, the configuration needs {shape}")
        flat.append((path, variable.replace(jnp.asarray(array, jnp.float32))))
    if left:
        raise UsageError(f"{where}: {len(left)} weights that this model does not have, the first is {min(left)!r}")
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
