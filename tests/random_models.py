"""Models of random weights for tests, biases and norms included, without compiling an initialiser."""

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from calm.runs.weights import build_with_weights


class Layer:
    """A configuration made of a function `rngs -> module`."""

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self.make = build

    def build(self, *, rngs: nnx.Rngs, precision: str = "float32") -> nnx.Module:
        return self.make(rngs)


def random_model(config: Any, seed: int = 0, precision: str = "float32") -> Any:
    """`config.build(...)` with every weight drawn: kernels with standard deviation 1/sqrt(fan-in), scales near 1."""
    generator, weights = np.random.default_rng(seed), {}
    for path, variable in nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))):
        shape = variable.get_value().shape
        noise = np.asarray(generator.standard_normal(shape, np.float32))
        kind = path[-1]
        weights[".".join(path)] = {
            "kernel": lambda noise=noise, shape=shape: noise * shape[-2] ** -0.5,
            "scale": lambda noise=noise: 1 + 0.1 * noise,
            "bias": lambda noise=noise: 0.1 * noise,
            "embedding": lambda noise=noise: noise,
            "table": lambda noise=noise: noise,
            "from_place": lambda noise=noise: 0.1 * noise,
            "match": lambda noise=noise: 3 + noise,
            "log_std": lambda noise=noise: 0.1 * noise - 1,
            "log_sharpness": lambda noise=noise: 0.1 * noise,
            "nothing": lambda noise=noise: 3 + noise,
        }[kind]()
    return build_with_weights(config, weights, precision=precision, where="test")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normals in float32."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
