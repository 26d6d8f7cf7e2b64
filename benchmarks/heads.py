"""What each head makes of a small law that is known exactly, after a short training.

    python -m benchmarks.heads [--steps 1000]

Two hidden states. After the first, the latent is N(+2, .3^2) in every dimension with probability .7, else N(-2, .3^2); after
the second it is N(1, .3^2). Printed: loss of the last step, seconds of training, the share of the first mode, how many samples
are in neither (more than 1 away from both in some dimension), and mean and standard deviation after the second hidden state.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from calm.core.posterior import Gaussian
from calm.heads import HeadConfig
from calm.heads.diffusion import DiffusionHeadConfig
from calm.heads.flow import FlowHeadConfig
from calm.heads.mixture import MixtureHeadConfig

HEADS: dict[str, HeadConfig] = {
    "flow, 10 midpoint steps": FlowHeadConfig(),
    "flow, 20 Euler steps": FlowHeadConfig(solver="euler", num_steps=20),
    "flow, 2 midpoint steps": FlowHeadConfig(num_steps=2),
    "diffusion, 100 steps": DiffusionHeadConfig(),
    "diffusion, 25 steps": DiffusionHeadConfig(num_steps=25),
    "diffusion of the noise, 100 steps": DiffusionHeadConfig(prediction="noise"),
    "mixture, 16 components": MixtureHeadConfig(),
}
DIM, LATENT, ROWS, STD = 32, 8, 256, 0.3


def draw(key: Any, contexts: Any) -> tuple[Any, Gaussian]:
    """A batch of hidden states and of posteriors as sharp as the law's modes."""
    which, sign = jax.random.split(key)
    which = jax.random.bernoulli(which, 0.5, (ROWS, 1))
    far = jnp.where(jax.random.bernoulli(sign, 0.7, (ROWS, 1)), 2.0, -2.0)
    mean = jnp.where(which, 1.0, far) * jnp.ones((ROWS, LATENT))
    return contexts[which[:, 0].astype(jnp.int32)], Gaussian(mean, jnp.full((ROWS, LATENT), np.log(STD)))


def measure(config: HeadConfig, steps: int) -> list[str]:
    graphdef, params = nnx.split(config.build(DIM, LATENT, rngs=nnx.Rngs(0)))
    contexts = jax.random.normal(jax.random.key(9), (2, DIM))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(params: Any, state: Any, key: Any) -> tuple[Any, Any, Any]:
        data, noise = jax.random.split(key)
        hidden, posterior = draw(data, contexts)

        def objective(params: Any) -> Any:
            head: Any = nnx.merge(graphdef, params)
            return head.loss(noise, hidden, posterior).mean()

        loss, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    state, began, loss = optimizer.init(params), 0.0, jnp.inf
    for number in range(steps):
        params, state, loss = step(params, state, jax.random.key(number))
        if number == 0:
            jax.block_until_ready(loss)
            began = time.perf_counter()
    jax.block_until_ready(loss)
    seconds = time.perf_counter() - began
    samples = np.asarray(jax.jit(lambda: nnx.merge(graphdef, params).sample(jax.random.key(1), contexts, 4000))())
    first, second = samples[:, 0], samples[:, 1]
    high, low = (np.abs(first - mode).max(-1) < 1 for mode in (2.0, -2.0))
    numbers = (
        float(loss),
        seconds,
        high.sum() / max((high | low).sum(), 1),
        1 - (high | low).mean(),
        second.mean(),
        second.std(),
    )
    return [f"{x:.2f}" for x in numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    print("| head | loss | seconds | first mode (.70) | in neither (.01) | mean (1.00) | std (.30) |")
    print("|---|---|---|---|---|---|---|")
    for name, config in HEADS.items():
        print(f"| {name} | {' | '.join(measure(config, steps))} |", flush=True)


if __name__ == "__main__":
    main()
