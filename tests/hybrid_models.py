"""Small backbones of several patterns, with random weights, so that everything in them matters."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm.core.backbone import BackboneConfig
from calm.hybrid.hopfield import HopfieldConfig
from calm.hybrid.state_space import SSMConfig

DIM = 8
MEMORY = HopfieldConfig(memory="context", num_heads=2, refinements=(2, 1))
SIZES = dict(dim=DIM, num_heads=2, num_kv_heads=1, inner_dim=12, hopfield=MEMORY, ssm=SSMConfig(state_dim=4, num_heads=2))
CONFIGS = {
    "by turns": BackboneConfig(pattern="C,GH", num_layers=4, **SIZES),
    "reasoner": BackboneConfig(pattern="SHA", num_layers=2, num_segments=2, **SIZES),
}
EVERY = sorted(CONFIGS)


@cache
def built(config: BackboneConfig, precision: str = "float32"):
    """The model of a configuration, without compiling an initialiser."""
    generator = np.random.default_rng(1)
    graphdef, weights = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0), precision=precision)))

    def draw(path, x):
        names, noise = [getattr(entry, "key", None) for entry in path], generator.standard_normal(x.shape, np.float32)
        kernel = "kernel" in names and "conv" not in names
        return jnp.asarray(noise * x.shape[-2] ** -0.5 if kernel else (1.0 if "scale" in names else 0.0) + 0.3 * noise)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, weights))


def hidden(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (*shape, DIM), jnp.float32)


@jax.jit
def whole(model, hidden):
    return model(hidden)[0]


@jax.jit
def read(model, hidden, state):
    return model(hidden, state)


def begun(model, batch: int, context: int, starts=None, *, rewindable: bool = False):
    make = jax.jit(lambda model, starts: model.init_state(batch, context, starts, rewindable=rewindable))
    return make(model, starts)
