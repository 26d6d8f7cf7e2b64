"""Devices as a mesh from the start, and which device holds which part of what. One device is the special case of it.

Two axes: batches are split over `data`; parameters are split over `model` (and with `shard_over_data` over `data` as well) and
gathered by the compiler where they are used. What is split is decided by rules over parameter names, else by size. The
optimiser's moments and the moving average lie as the parameters do.

Axis types are Auto: the compiler inserts the communication, and a model is written as for one device.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from calm.errors import UsageError
from calm.train.trees import map_named, named_leaves

DATA, MODEL = "data", "model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices share the batch, how many share the parameters, and how these are cut."""

    data: int = 0
    """devices along the batch; 0 = all that `model` leaves"""
    model: int = 1
    """devices along the parameters"""
    shard_over_data: bool = False
    """split parameters and optimiser state over the `data` axis too (fully sharded data parallelism)"""
    minimum_size: int = 65_536
    """smaller arrays are held whole by every device, unless a rule names them"""
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(regular expression on the parameter's name, one axis name per axis, "" = not split), first match; the rest by size"""

    def __post_init__(self) -> None:
        if self.data < 0 or self.model < 1:
            raise UsageError("mesh: data must be 0 (all devices) or more, model 1 or more")
        for pattern, axes in self.rules:
            if unknown := set(axes) - {DATA, MODEL, ""}:
                raise UsageError(f"mesh: rule {pattern!r} names the axis {unknown.pop()!r}; there are 'data', 'model', ''")

    def build(self) -> Mesh:
        """The mesh over this job's devices, of every host."""
        devices = jax.device_count()
        data = self.data or devices // self.model
        if data * self.model > devices or data < 1:
            raise UsageError(f"mesh: data={self.data} times model={self.model} asks for more than the {devices} devices here")
        if data * self.model < devices and jax.process_count() > 1:
            raise UsageError(f"mesh: with several hosts data x model must use all {devices} devices")
        chosen = jax.devices()[: data * self.model]
        return jax.make_mesh((data, self.model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=chosen)

    def spec(self, name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
        """How the parameter `name` is cut over axes of `sizes`: by the first rule that finds it, or else by size."""
        for pattern, axes in self.rules:
            if re.search(pattern, name):
                return _ruled(pattern, name, axes, shape, sizes)
        if np.prod(shape, dtype=np.int64) < self.minimum_size:
            return PartitionSpec()
        cut: list[str | None] = [None] * len(shape)
        for axis in (MODEL, DATA) if self.shard_over_data else (MODEL,):
            size = sizes[axis]
            free = [i for i, length in enumerate(shape) if cut[i] is None and length % size == 0]
            if size > 1 and free:
                cut[max(free, key=lambda i: shape[i])] = axis
        return PartitionSpec(*cut)

    def shardings(self, tree: Any, mesh: Mesh, params: Any = None) -> Any:
        """The sharding of every leaf.

        With `params`, leaves of `tree` that belong to a parameter lie as that parameter does, and all others are whole on every
        device: for the optimiser's state, whose leaf names end in parameter names.
        """
        shapes = {name: leaf.shape for name, leaf in named_leaves(tree if params is None else params).items()}

        def sharding(name: str, leaf: Any) -> NamedSharding:
            owner = next((end for end in _endings(name) if shapes.get(end) == leaf.shape), None)
            return NamedSharding(mesh, PartitionSpec() if owner is None else self.spec(owner, leaf.shape, mesh.shape))

        return map_named(sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_batch(tokens: np.ndarray, accumulation: int, mesh: Mesh) -> jax.Array:
    """This host's rows `[B T]` of a global batch -> the global batch on the devices, `[A B/A T]`, rows split over `data`.

    Cutting into A microbatches happens here, on the host, so that every microbatch is spread over all devices.
    """
    rows, length = tokens.shape
    if rows % accumulation:
        raise UsageError(f"a batch of {rows} rows a host cannot be cut into accumulation={accumulation} equal parts")
    tokens = np.ascontiguousarray(tokens.reshape(accumulation, rows // accumulation, length), np.int32)
    sharding = NamedSharding(mesh, PartitionSpec(None, DATA))
    if jax.process_count() == 1:
        return jax.device_put(tokens, sharding)
    return jax.make_array_from_process_local_data(sharding, tokens)


def initialize_distributed(environment: Mapping[str, str] = os.environ) -> bool:
    """Joins the other hosts when the environment names them; to be called before anything asks JAX for its devices.

    JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, or a SLURM job of several tasks (which JAX reads itself).
    A second call does nothing. Returns whether this process is one of several.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    if address := environment.get("JAX_COORDINATOR_ADDRESS"):
        try:
            processes, process = (int(environment[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        except (KeyError, ValueError) as error:
            raise UsageError(
                "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers too"
            ) from error
        jax.distributed.initialize(address, processes, process)
        return processes > 1
    if environment.get("SLURM_JOB_ID") and int(environment.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize()
        return True
    return False


def _ruled(pattern: str, name: str, axes: tuple[str, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    if len(axes) != len(shape):
        raise UsageError(f"mesh: rule {pattern!r} gives {len(axes)} axes, but {name} has shape {shape}")
    for axis, length in zip(axes, shape, strict=True):
        if axis and length % sizes[axis]:
            raise UsageError(f"mesh: rule {pattern!r} splits {name} {shape} over {sizes[axis]} devices: not divisible")
    return PartitionSpec(*(axis or None for axis in axes))


def _endings(name: str) -> list[str]:
    """`0.mu.layer.kernel` -> itself, `mu.layer.kernel`, `layer.kernel`, `kernel`, of which the longest parameter name wins."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
