"""The fused cross-entropy is the plain one, in value and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.cross_entropy import fused_cross_entropy, plain_cross_entropy
from calm.core.dense import PRECISIONS, operand
from random_models import normal

ROWS, DIM, VOCAB = 700, 8, 51  # more than a block of rows, and not a multiple of one
HIDDEN, TABLE = jnp.asarray(2 * normal(ROWS, DIM)), jnp.asarray(normal(VOCAB, DIM, seed=1))
GENERATOR = np.random.default_rng(2)
TARGETS = jnp.asarray(GENERATOR.integers(0, VOCAB, ROWS), jnp.int32)
WEIGHTS = jnp.asarray(GENERATOR.random(ROWS), jnp.float32)


def test_plain_is_the_definition():
    logits = np.asarray(HIDDEN, np.float64) @ np.asarray(TABLE, np.float64).T
    expected = np.log(np.exp(logits).sum(-1)) - logits[np.arange(ROWS), TARGETS]
    np.testing.assert_allclose(jax.jit(plain_cross_entropy)(HIDDEN, TABLE, TARGETS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_fused_is_plain_in_value_and_gradients(precision):
    def plain(hidden, table):
        hidden, table = (operand(x, precision).astype(jnp.float32) for x in (hidden, table))
        return 3 * (WEIGHTS * plain_cross_entropy(hidden, table, TARGETS)).sum()

    def fused(hidden, table):
        return 3 * fused_cross_entropy(hidden, table, TARGETS, WEIGHTS, precision)

    (value, gradients), (expected, references) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(HIDDEN, TABLE) for f in (fused, plain)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(gradients, references, strict=True):
        tolerance = 1e-5 if precision == "float32" else 5e-3  # there the softmax is rounded too
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * float(jnp.abs(theirs).max()))


def test_a_frozen_table_costs_no_gradient_and_changes_no_other():
    def gradients(table_gradient):
        def loss(hidden, table):
            return fused_cross_entropy(hidden, table, TARGETS, WEIGHTS, "float32", table_gradient)

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(HIDDEN, TABLE)

    (hidden, table), (same, nothing) = gradients(True), gradients(False)
    np.testing.assert_array_equal(hidden, same)
    assert jnp.abs(table).max() > 0 and jnp.abs(nothing).max() == 0


def test_huge_logits_stay_finite():
    run = jax.jit(jax.value_and_grad(lambda hidden: fused_cross_entropy(hidden, TABLE, TARGETS, WEIGHTS)))
    value, gradient = run(1e4 * HIDDEN)
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()
