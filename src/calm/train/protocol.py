"""Interfaces that the training loop requires: an objective and a stream of batches."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float, Int

from calm.rng import PRNGKey

Params = Any
"""A pytree of arrays: an `nnx.State`, a dict, a tuple."""

Measured = float | list[float]
"""a metric's value: a number, or a curve such as one value for each position"""

Evaluate = Callable[[Params, int], Mapping[str, Measured]]
"""(parameters to evaluate, step) -> metric name -> value. The parameters are live buffers that the next step overwrites."""

Sample = Callable[[Params, int], str]
"""(parameters to evaluate, step) -> text for a person to read."""


@runtime_checkable
class Objective(Protocol):
    """An objective to minimise. Everything that is trained comes from `init`; everything that is not is in `frozen`."""

    @property
    def frozen(self) -> Params:
        """Arrays that the loss needs and that are not trained ({} if none): an argument of the compiled step."""
        ...

    def init(self, key: PRNGKey) -> Params:
        """The trainable parameters, float32."""
        ...

    def loss(
        self, params: Params, frozen: Params, tokens: Int[Array, "B T"], key: PRNGKey, step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean loss of a batch, and metrics that are means over the batch too: numbers, and curves `[X]`, which only
        validation looks at."""
        ...

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of one token of text, analytic."""
        ...


@runtime_checkable
class BatchStream(Protocol):
    """An endless iterator of int32 `[B T]` whose position is a small dict of whole numbers."""

    @property
    def state(self) -> dict[str, int]: ...

    def restore(self, state: dict[str, int]) -> None: ...

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def __next__(self) -> np.ndarray: ...
