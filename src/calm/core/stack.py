"""Equal layers stacked along a leading axis and scanned: one compiled layer and one array per weight, at any depth."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

MAX_UNROLLED = 8


class Stack(nnx.Module):
    """`length` copies of a layer, each with its own weights, held as one layer whose arrays have a leading layer axis.

    A model of a few stacked arrays costs a fifth of the dispatch time of one with an array per layer and weight, and compiles
    in the time of one layer (measured: docs/log.md).
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module], length: int, *, rngs: nnx.Rngs):
        def weights(key: jax.Array) -> Any:
            return nnx.state(build(nnx.Rngs(params=key)))

        keys = jax.random.split(rngs.params(), length)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: build(nnx.Rngs(params=jax.random.key(0)))))
        self.layer = nnx.merge(graphdef, jax.vmap(weights)(keys))
        self.length = length

    def each(self, function: Callable, *xs: Any) -> Any:
        """`function(layer_l, *xs_l)` for every layer, none after another; results get a leading layer axis."""
        graphdef, weights = nnx.split(self.layer)
        return jax.vmap(lambda weights, *xs: function(nnx.merge(graphdef, weights), *xs))(weights, *xs)

    def beside(self, xs: Any, arrays: Any) -> Any:
        """What `scan` takes along: `xs`, or None, in the form it has for these layers, and arrays with a leading layer axis."""
        return xs, arrays

    def scan(self, step: Callable, carry: Any, xs: Any = None, *, remat: bool = False) -> tuple[Any, Any]:
        """`carry, y_l = step(layer_l, carry, x_l)` over the layers; returns the last carry and the stacked ys.

        `remat` recomputes each layer in the backward pass instead of keeping its activations.
        """
        graphdef, weights = nnx.split(self.layer)

        def body(carry: Any, slices: Any) -> tuple[Any, Any]:
            layer_weights, x = slices
            return step(nnx.merge(graphdef, layer_weights), carry, x)

        body = jax.checkpoint(body) if remat else body
        # A loop's body is compiled alone: what it keeps for the backward pass is copied into and out of stacked arrays. Where
        # layers are few, writing them out costs little to compile; on CPU a training step is 1.3 times faster (docs/log.md).
        few = self.length <= MAX_UNROLLED and jax.default_backend() == "cpu"
        return jax.lax.scan(body, carry, (weights, xs), length=self.length, unroll=self.length if few else 1)
