"""Devices: four of them agree with one, and rules decide who holds what."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from calm.errors import UsageError
from calm.train.mesh import MeshConfig, initialize_distributed

PROGRAM = """
import jax, numpy as np
from toy_training import ToyBatches, ToyObjective
from calm.train.mesh import MeshConfig
from calm.train.optim import OptimizerConfig
from calm.train.steps import StepConfig, TrainStep

config = StepConfig(total_steps=20, batch_size=8, num_tokens=12, accumulation=2, ema_decay=0.9,
                    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0))

def losses(layout):
    step = TrainStep(ToyObjective(noise=0.1), config, layout.build(), layout)
    leaves, batches = step.init(jax.random.key(0)), ToyBatches()
    each = []
    for _ in range(20):
        leaves = step(leaves, next(batches))
        each.append(float(step.state(leaves).sums["loss"]))
    return np.array(each), step.state(leaves)

assert jax.device_count() == 4
one, _ = losses(MeshConfig(data=1))
for layout in (MeshConfig(data=4, minimum_size=0, shard_over_data=True), MeshConfig(data=2, model=2, minimum_size=0)):
    four, state = losses(layout)
    np.testing.assert_allclose(four, one, rtol=1e-5)
    kernel = state.params["layers"]["kernel"]
    moment = next(leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape == kernel.shape)
    for leaf in (kernel, moment, state.average["layers"]["kernel"]):
        pieces = {str(shard.index) for shard in leaf.addressable_shards}
        assert len(pieces) == (4 if layout.shard_over_data else 2), leaf.sharding
print("agree")
"""


def test_four_devices_agree_with_one_with_parameters_in_pieces():
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "JAX_NUM_CPU_DEVICES": "4"}
    answer = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=200)
    assert answer.stdout.strip() == "agree", answer.stderr


SIZES = {"data": 2, "model": 4}


@pytest.mark.parametrize(
    "name, shape, config, expected",
    [
        ("up.kernel", (8, 16), MeshConfig(minimum_size=0), (None, "model")),
        ("up.kernel", (16, 8), MeshConfig(minimum_size=0, shard_over_data=True), ("model", "data")),
        ("up.kernel", (6, 10), MeshConfig(minimum_size=0), (None, None)),
        ("up.kernel", (8, 16), MeshConfig(), ()),
        ("up.kernel", (8, 16), MeshConfig(rules=(("up", ("model", "")),)), ("model", None)),
    ],
)
def test_parameters_are_cut_by_rule_then_by_size(name, shape, config, expected):
    assert config.spec(name, shape, SIZES) == PartitionSpec(*expected)


def test_the_optimisers_moments_lie_as_their_parameters():
    config, mesh = MeshConfig(minimum_size=0), MeshConfig().build()
    params = {"up": {"kernel": jnp.zeros((4, 8))}, "norm": {"scale": jnp.zeros(8)}}
    state = {"mu": params, "count": jnp.zeros(()), "kernel": jnp.zeros(3)}
    shardings = config.shardings(state, mesh, params)
    assert shardings["mu"]["up"]["kernel"] == config.shardings(params, mesh)["up"]["kernel"]
    assert shardings["count"].spec == shardings["kernel"].spec == PartitionSpec()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MeshConfig(model=0), "model 1 or more"),
        (lambda: MeshConfig(rules=(("x", ("rows",)),)), "names the axis 'rows'"),
        (lambda: MeshConfig(data=64, model=64).build(), "asks for more than"),
        (lambda: MeshConfig(rules=(("k", ("model",)),)).spec("k", (8, 8), SIZES), "gives 1 axes"),
        (lambda: MeshConfig(rules=(("k", ("model", "")),)).spec("k", (6, 8), SIZES), "not divisible"),
        (lambda: initialize_distributed({"JAX_COORDINATOR_ADDRESS": "host:1"}), "JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
    ],
)
def test_meshes_that_cannot_be_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_alone_there_is_nothing_to_join():
    assert not initialize_distributed({}) and jax.process_count() == 1
    assert np.prod(list(MeshConfig().build().shape.values())) == jax.device_count()
