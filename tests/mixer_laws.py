"""The laws of a recurrent mixer, each a function of its configuration: one file a mixer says what else is true of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.mixer import Fork, Window
from calm.errors import UsageError
from jaxpr_flops import matmul_flops
from random_models import normal

DIM, BATCH, LENGTH = 8, 2, 37
HIDDEN = normal(BATCH, LENGTH, DIM)
STARTS = (0, 3)
CALL = jax.jit(lambda mixer, hidden, state, at: mixer(hidden, state, at))


def built(config: Any, precision: str = "float32", seed: int = 0) -> Any:
    """With every bias moved off its first value."""
    graph, weights = nnx.split(config.build(DIM, rngs=nnx.Rngs(0), precision=precision))
    leaves, tree = jax.tree.flatten(weights)
    leaves = [leaf + 0.1 * normal(*leaf.shape, seed=seed + i) if leaf.ndim == 1 else leaf for i, leaf in enumerate(leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


def window(offset: int = 0, starts: tuple[int, ...] = (0,) * BATCH) -> Window:
    return Window(jnp.asarray(offset, jnp.int32), jnp.asarray(starts, jnp.int32))


def in_parts(mixer: Any, hidden: Any, state: Any, ends: tuple[int, ...], starts: tuple[int, ...] = (0,) * BATCH) -> Any:
    at, found = window(starts=starts), []
    for block in jnp.split(hidden, ends, axis=1):
        part, state = CALL(mixer, block, state, at)
        found.append(part)
        at = at.after(block.shape[1])
    return jnp.concatenate(found, axis=1), state


def modes_are_equal(config: Any, precision: str) -> None:
    """One block behind another, of one position and of more than a chunk, is the whole sequence: values and gradients."""
    mixer, exact = built(config, precision), precision == "float32"
    whole = CALL(mixer, HIDDEN, None, window())[0]
    assert np.abs(whole).max() > 0.1
    for rewindable in (False, True):
        state = mixer.init_state(BATCH, LENGTH + 2, rewindable=rewindable)
        parts, _ = in_parts(mixer, HIDDEN, state, (1, 2, 35))
        np.testing.assert_allclose(parts, whole, atol=1e-5 if exact else 3e-2)
    if not exact:
        return
    graph, weights = nnx.split(mixer)

    def slope(run: Any) -> Any:
        return jax.jit(jax.grad(lambda weights, hidden: jnp.sin(run(nnx.merge(graph, weights), hidden)).sum(), (0, 1)))(
            weights, HIDDEN
        )

    parts = slope(lambda mixer, hidden: in_parts(mixer, hidden, mixer.init_state(BATCH, LENGTH), (1, 35))[0])
    whole = slope(lambda mixer, hidden: mixer(hidden, None, window())[0])
    for ours, theirs in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * max(1.0, np.abs(theirs).max()))


def the_future_stays_away(config: Any) -> None:
    mixer, changed = built(config), HIDDEN.copy()
    changed[:, 20:] += 1.0
    before, after = CALL(mixer, HIDDEN, None, window())[0], CALL(mixer, changed, None, window())[0]
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert (np.abs(before - after)[:, 20:].max(-1) > 1e-4).all()


def padding_leaves_no_trace(config: Any) -> None:
    """In a state as well: the row computes what it would compute alone, in one block and position by position."""
    mixer, padded = built(config), HIDDEN.copy()
    padded[1, :3] = 1e3
    alone, _ = CALL(mixer, HIDDEN[1:, 3:], None, Window(jnp.int32(0), jnp.zeros((1,), jnp.int32)))
    for ends, rewindable in (((), True), ((1, 2, 10), False)):
        state = mixer.init_state(BATCH, LENGTH, rewindable=rewindable)
        together, _ = in_parts(mixer, padded, state, ends, STARTS)
        np.testing.assert_allclose(together[1, 3:], alone[0], atol=1e-5)

    def after(hidden: Any) -> Any:
        return (mixer(hidden, None, window(starts=STARTS))[0][1, 3:] ** 2).sum()

    slope = jax.jit(jax.grad(after))(jnp.asarray(padded))
    assert (slope[1, :3] == 0).all() and np.isfinite(slope).all() and (slope[1, 3:] != 0).any()


def branches_are_rewound_copies(config: Any) -> None:
    """And a rewound copy is the prefix read: from any position, within a chunk, at its end, and beyond the first."""
    mixer, ends, branches, depth = built(config), np.array([4, 5, 32, 37]), 2, 3
    own = normal(depth, BATCH, len(ends), branches, DIM, seed=4)
    _, full = CALL(mixer, HIDDEN, mixer.init_state(BATCH, LENGTH + depth, rewindable=True), window(starts=STARTS))
    state = mixer.fork(full, jnp.asarray(ends), branches, depth)
    at = Fork(jnp.repeat(jnp.asarray(ends), branches), jnp.int32(0), jnp.asarray(STARTS, jnp.int32))
    together = []
    for block in own:
        part, state = CALL(mixer, block.reshape(BATCH, -1, DIM), state, at)
        together.append(part.reshape(block.shape))
        at = at.after(1)
    rewound = jax.jit(lambda state, position: mixer.rewind(state, position))
    for a, end in enumerate(ends):
        _, read = CALL(mixer, HIDDEN[:, :end], mixer.init_state(BATCH, LENGTH), window(starts=STARTS))
        for branch in range(branches):
            steps = own[:, :, a, branch].swapaxes(0, 1)
            for state in (read, rewound(full, end)):
                alone, _ = CALL(mixer, steps, state, window(int(end), STARTS))
                for step in range(depth):
                    np.testing.assert_allclose(together[step][:, a, branch], alone[:, step], atol=1e-5)


def states_keep_their_size(config: Any) -> None:
    """In any context, unless it is to be rewound; then it grows by the same for every position."""
    mixer = config.build(DIM, rngs=nnx.Rngs(0))

    def size(context: int, rewindable: bool) -> int:
        return sum(x.size for x in jax.tree.leaves(mixer.init_state(BATCH, context, rewindable=rewindable)))

    assert size(10, False) == size(10_000, False)
    assert size(30, True) - size(20, True) == size(20, True) - size(10, True) > 0
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(mixer.init_state(BATCH, 9, rewindable=True)))


def only_a_trail_goes_back(config: Any) -> None:
    mixer = config.build(DIM, rngs=nnx.Rngs(0))
    state = mixer.init_state(BATCH, LENGTH)
    for attempt in (lambda: mixer.fork(state, jnp.array([2]), 1, 1), lambda: mixer.rewind(state, 2)):
        with pytest.raises(UsageError, match="rewindable=True"):
            attempt()


def costs_are_those_of_what_is_built(config: Any, dim: int = 64) -> None:
    """Parameters exactly; FLOPs within a tenth of the products in the traced program, which has no count of the elementwise."""
    mixer = nnx.eval_shape(lambda: config.build(dim, rngs=nnx.Rngs(0)))
    assert config.parameters(dim) == sum(x.size for x in jax.tree.leaves(nnx.state(mixer)))
    mixer = config.build(dim, rngs=nnx.Rngs(0))
    for context in (8, 96):
        hidden = jax.ShapeDtypeStruct((1, context, dim), jnp.float32)
        counted = matmul_flops(lambda hidden: mixer(hidden, None, window(starts=(0,)))[0], hidden)
        np.testing.assert_allclose(context * config.flops(dim, context), counted, rtol=0.1)
