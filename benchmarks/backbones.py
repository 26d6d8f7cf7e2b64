"""What each letter of a backbone's pattern costs, and how near the reasoner's one-step gradient is to the full one.

python benchmarks/backbones.py            # the tables of docs/backbones.md, at D = 256
"""

import argparse
import dataclasses
from typing import Any

CONTEXT = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    letters()
    gradients(seed)


def letters() -> None:
    """Parameters, FLOPs and state of each mixer alone; shapes only."""
    import jax
    from flax import nnx

    from calm.core.backbone import BackboneConfig

    config = BackboneConfig(dim=256, num_layers=1)
    print(f"context {CONTEXT}\n")
    print("| letter | parameters | FLOPs a position | state, numbers a row | rewindable |\n|---|---|---|---|---|")
    for letter in "ASCHG":
        mixer = config.mixer(letter)

        def numbers(rewindable: bool, mixer: Any = mixer) -> int:
            def make() -> Any:
                return mixer.build(config.dim, rngs=nnx.Rngs(0)).init_state(1, CONTEXT, rewindable=rewindable)

            return sum(x.size for x in jax.tree.leaves(jax.eval_shape(make)))

        sizes = (mixer.parameters(config.dim), mixer.flops(config.dim, CONTEXT), numbers(False), numbers(True))
        print(f"| {letter} | " + " | ".join(f"{size:,}" for size in sizes) + " |")


def gradients(seed: int) -> None:
    """Cosine between the one-step and the full gradient of a random linear loss, the controller's last layer drawn at several
    scales: the farther it has moved from 0, the more of the gradient goes through the first segment."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from calm.core.backbone import BackboneConfig

    config = BackboneConfig(dim=64, num_layers=4, num_heads=4, inner_dim=172, pattern="SHA", num_segments=2)
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden, aim = (jax.random.normal(key, (4, 64, config.dim)) for key in keys[:2])
    model = nnx.jit(lambda: config.build(rngs=nnx.Rngs(seed)))()
    kernel = model.controller.out.kernel
    drawn = jax.random.normal(keys[2], kernel.shape) * config.dim**-0.5

    def gradient(kind: Any) -> Any:
        of_kind = dataclasses.replace(config, reasoner_gradient=kind)
        graphdef = nnx.graphdef(nnx.eval_shape(lambda: of_kind.build(rngs=nnx.Rngs(seed))))
        loss = jax.jit(jax.grad(lambda weights: (nnx.merge(graphdef, weights)(hidden)[0] * aim).sum()))
        return lambda: loss(nnx.state(model))

    one_step, full = gradient("one_step"), gradient("full")
    print("\n| controller's scale | standard deviation of the bias | cosine, whole model |\n|---|---|---|")
    for scale in (0.0, 0.1, 0.3, 1.0, 3.0):
        kernel[...] = scale * drawn
        bias = jax.jit(lambda model: model.controller(model.stack(hidden)[0]).std())(model)
        one, all_of_it = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(run())]) for run in (one_step, full))
        cosine = one @ all_of_it / (jnp.linalg.norm(one) * jnp.linalg.norm(all_of_it))
        print(f"| {scale} | {bias:.2f} | {cosine:.4f} |")


if __name__ == "__main__":
    main()
