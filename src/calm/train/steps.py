"""One update, compiled once: gradients of A microbatches, clipping, AdamW, moving average, metrics. Nothing leaves the device.

Between calls the state is held as a flat tuple of arrays: handing a tree of a hundred arrays with two moments and an average
to a compiled function costs four times as much Python when the tree is walked at every step (measured: docs/log.md).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from calm.errors import UsageError
from calm.rng import PRNGKey, stream
from calm.train.mesh import DATA, MeshConfig, put_batch
from calm.train.optim import OptimizerConfig
from calm.train.protocol import Objective, Params

Leaves = tuple[Array, ...]


class TrainState(NamedTuple):
    """All that the next step depends on, besides its batch. `step` counts the updates made."""

    step: Int[Array, ""]
    params: Params
    optimizer: Any
    average: Params
    """moving average of the parameters; {} when there is none"""
    key: UInt32[Array, "words"]
    """data of the run's root key: never advanced, since every stream folds the step in"""
    sums: dict[str, Float[Array, ""]]
    """metrics summed over the steps since the last record"""
    count: Int[Array, ""]
    """how many steps these are"""
    bad_step: Int[Array, ""]
    """the first step whose loss or gradient was not finite; -1 while there is none"""

    @property
    def best_params(self) -> Params:
        """The parameters to evaluate, sample from and export: the moving average where there is one."""
        return self.average if jax.tree.leaves(self.average) else self.params


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """The part of a run's configuration that is compiled into its step."""

    total_steps: int
    batch_size: int
    """rows of one update over all hosts, A microbatches together"""
    num_tokens: int
    """tokens T in a row"""
    optimizer: OptimizerConfig = OptimizerConfig()
    accumulation: int = 1
    """microbatches A of one update"""
    ema_decay: float = 0.0
    """decay of the moving average of the parameters; 0 = none. Early steps use (1 + step) / (10 + step) if smaller"""
    log_every: int = 1
    """metrics are averaged over the steps after the last multiple of this, up to the present one"""


class TrainStep:
    """The compiled step of an objective on a mesh.

    `leaves = step.init(key)`, then `leaves = step(leaves, tokens)`: the leaves passed in are donated: not to be used again.
    `step.state(leaves)` gives them their names back, for the moments in which somebody looks.
    """

    def __init__(self, objective: Objective, config: StepConfig, mesh: Mesh, layout: MeshConfig | None = None):
        layout = layout or MeshConfig()
        _check_batch(config, mesh)
        self.objective, self.config, self.mesh = objective, config, mesh
        self.optimizer = config.optimizer.build(config.total_steps)
        self.learning_rate = config.optimizer.build_schedule(config.total_steps)
        self.frozen = jax.device_put(objective.frozen, layout.shardings(objective.frozen, mesh))
        self.abstract = self._abstract(layout)
        self._structure = jax.tree.structure(self.abstract)
        self._shardings = tuple(leaf.sharding for leaf in jax.tree.leaves(self.abstract))
        frozen, frozen_structure = jax.tree.flatten(self.frozen)
        self._frozen = tuple(frozen)

        def update(leaves: Leaves, frozen: Leaves, tokens: Array) -> Leaves:
            state = self._update(self.state(leaves), jax.tree.unflatten(frozen_structure, frozen), tokens)
            return tuple(jax.tree.leaves(state))

        self._step = jax.jit(update, donate_argnums=0, out_shardings=self._shardings)

    def init(self, key: PRNGKey, params: Params | None = None) -> Leaves:
        """The state before the first step, of `params` or else of fresh ones, which are created where they will lie."""

        def init(key: PRNGKey, params: Params | None) -> Leaves:
            return tuple(jax.tree.leaves(self._init(key, params)))

        return jax.jit(init, out_shardings=self._shardings)(key, params)

    def __call__(self, leaves: Leaves, tokens: np.ndarray) -> Leaves:
        """One update on this host's rows `[B T]` of the global batch."""
        return self._step(leaves, self._frozen, put_batch(tokens, self.config.accumulation, self.mesh))

    def state(self, leaves: Leaves) -> TrainState:
        """The leaves under their names."""
        return jax.tree.unflatten(self._structure, leaves)

    def leaves(self, state: TrainState) -> Leaves:
        """The inverse of `state`."""
        return tuple(jax.tree.leaves(state))

    def _init(self, key: PRNGKey, params: Params | None = None) -> TrainState:
        params = self.objective.init(stream(key, "init")) if params is None else params
        shape = (self.config.accumulation, self.config.batch_size // self.config.accumulation, self.config.num_tokens)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        zero = jnp.zeros((), jnp.int32)
        _, metrics = jax.eval_shape(self._gradients, params, self.frozen, tokens, key, zero)
        return TrainState(
            step=zero,
            params=params,
            optimizer=self.optimizer.init(params),
            average=jax.tree.map(jnp.copy, params) if self.config.ema_decay else {},
            key=jax.random.key_data(key),
            sums={name: jnp.zeros((), jnp.float32) for name in metrics},
            count=zero,
            bad_step=zero - 1,
        )

    def _abstract(self, layout: MeshConfig) -> TrainState:
        """Shapes, types and shardings of the state, without making it."""
        state = jax.eval_shape(self._init, jax.random.key(0))
        shardings = layout.shardings(state, self.mesh, state.params)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), state, shardings)

    def _gradients(
        self, params: Params, frozen: Params, tokens: Int[Array, "A B T"], key: PRNGKey, step: Int[Array, ""]
    ) -> tuple[Params, dict[str, Array]]:
        """Gradients and metrics of the mean loss over all microbatches; of several, each has its own stream."""

        def microbatch(tokens: Array, key: PRNGKey) -> tuple[Params, dict[str, Array]]:
            value_and_grad = jax.value_and_grad(self.objective.loss, has_aux=True)
            (loss, metrics), gradients = value_and_grad(params, frozen, tokens, key, step)
            numbers = {name: x for name, x in {**metrics, "loss": loss}.items() if jnp.ndim(x) == 0}  # curves: validation's
            return gradients, {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}

        if self.config.accumulation == 1:
            gradients, metrics = microbatch(tokens[0], key)
        else:

            def add(sums: Any, part: tuple[Array, Array]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, microbatch(part[0], stream(key, "microbatch", part[1]))), None

            shapes = jax.eval_shape(microbatch, tokens[0], key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            sums, _ = jax.lax.scan(add, zeros, (tokens, jnp.arange(self.config.accumulation)))
            gradients, metrics = jax.tree.map(lambda total: total / self.config.accumulation, sums)
        return gradients, metrics | {"grad_norm": optax.tree.norm(gradients)}

    def _update(self, state: TrainState, frozen: Params, tokens: Int[Array, "A B T"]) -> TrainState:
        key = stream(jax.random.wrap_key_data(state.key), "train", state.step)
        gradients, metrics = self._gradients(state.params, frozen, tokens, key, state.step)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)

        step = state.step.astype(jnp.float32)
        decay = jnp.minimum(self.config.ema_decay, (1 + step) / (10 + step))
        average = state.average
        if self.config.ema_decay:
            average = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), state.average, params)

        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        fresh = (state.step - 1) % self.config.log_every == 0  # the step before was recorded
        return TrainState(
            step=state.step + 1,
            params=params,
            optimizer=optimizer,
            average=average,
            key=state.key,
            sums={name: jnp.where(fresh, 0.0, total) + metrics[name] for name, total in state.sums.items()},
            count=jnp.where(fresh, 0, state.count) + 1,
            bad_step=jnp.where(finite | (state.bad_step >= 0), state.bad_step, state.step),
        )


def _check_batch(config: StepConfig, mesh: Mesh) -> None:
    parts = config.accumulation * mesh.shape[DATA]
    if config.batch_size % parts:
        raise UsageError(
            f"batch_size={config.batch_size} must be a multiple of accumulation={config.accumulation} "
            f"times the {mesh.shape[DATA]} devices along the mesh's data axis"
        )
