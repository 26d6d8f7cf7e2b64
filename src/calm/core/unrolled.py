"""Stacked layers taken apart again, for loops that push little data through every layer.

A scan over layers copies each layer's weights, and its state, out of the stack and back on every pass. In training that is
nothing next to the products; in generation, where a pass is a few rows, it is most of the time. Compiling takes longer.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, TypeVar

import jax
from flax import nnx

from calm.core.stack import Stack

M = TypeVar("M", bound=nnx.Module)


class Unrolled(Stack):
    """A `Stack` as a list of layers. `scan` does the same; what is scanned along is a tuple with a place per layer."""

    def __init__(self, stack: Stack):
        self.length = stack.length
        graphdef, weights = nnx.split(stack.layer)
        self.layers = nnx.List([nnx.merge(graphdef, weights_of_layer) for weights_of_layer in unstack(weights, stack.length)])

    def each(self, function: Callable, *xs: Any) -> tuple[Any, ...]:
        """`Stack.each` with a place per layer in `xs` and in what is returned."""
        return tuple(function(*of_layer) for of_layer in zip(self.layers, *xs, strict=True))

    def beside(self, xs: Any, arrays: Any) -> Any:
        return tuple(zip(xs or (None,) * self.length, unstack(arrays, self.length), strict=True))

    def scan(self, step: Callable, carry: Any, xs: Any = None, *, remat: bool = False) -> tuple[Any, Any]:
        """`Stack.scan` with `xs` a tuple of one tree per layer, or None; `remat` means nothing here."""
        ys = []
        for layer, x in zip(self.layers, xs or (None,) * len(self.layers), strict=True):
            carry, y = step(layer, carry, x)
            ys.append(y)
        return carry, tuple(ys)


def unstack(tree: Any, length: int) -> tuple[Any, ...]:
    """A tree of arrays with a leading layer axis -> one tree per layer."""
    return tuple(jax.tree.map(itemgetter(layer), tree) for layer in range(length))


def unrolled(module: M) -> M:
    """A copy of `module` in which every `Stack` is `Unrolled`. Inside jit the copy costs one pass over the weights."""
    module = nnx.merge(*nnx.split(module))
    pending: list[nnx.Module] = [module]
    while pending:
        parent = pending.pop()
        for name, child in list(vars(parent).items()):
            if isinstance(child, Stack) and not isinstance(child, Unrolled):
                child = Unrolled(child)
                setattr(parent, name, child)
                pending.extend(child.layers)
            elif isinstance(child, nnx.Module):
                pending.append(child)
    return module
