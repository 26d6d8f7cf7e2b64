"""Hidden states to tokens: the blocked argmax is the plain one, drawn tokens follow the softmax, banned ids never appear."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.decoder import ARGMAX_ROWS, ScoringTable, best_token, draw_token


def example(rows: int, vocab_size: int) -> tuple[jax.Array, jax.Array]:
    return jax.random.normal(jax.random.key(0), (rows, 8)), jax.random.normal(jax.random.key(1), (vocab_size, 8))


@pytest.mark.parametrize("vocab_size", [3, 64, 130, 192])
@pytest.mark.parametrize("rows", [5, ARGMAX_ROWS + 3])
def test_the_blocked_argmax_is_the_plain_one(rows, vocab_size):
    states, table = example(rows, vocab_size)
    expected = jnp.argmax(states @ table.T, axis=-1)
    np.testing.assert_array_equal(best_token(states, table, "float32"), expected)
    np.testing.assert_array_equal(best_token(states, ScoringTable.of(table, "float32"), "float32"), expected)


@pytest.mark.parametrize("vocab_size", [5, 64, 130])
def test_banned_ids_never_win(vocab_size):
    states, table = example(300, vocab_size)
    banned = (0, vocab_size - 1)
    allowed = jnp.delete(jnp.arange(vocab_size), jnp.array(banned))
    expected = jnp.argmax((states @ table.T).at[:, banned].set(-jnp.inf), axis=-1)
    np.testing.assert_array_equal(best_token(states, ScoringTable.of(table, "float32", allowed), "float32"), expected)


@pytest.mark.parametrize("vocab_size", [5, 130])
def test_drawn_tokens_follow_the_softmax_without_banned_ids(vocab_size):
    state, table = example(1, vocab_size)
    draws, banned = 40_000, (1, vocab_size - 1)
    scoring = ScoringTable.of(table, "float32", jnp.delete(jnp.arange(vocab_size), jnp.array(banned)))
    uniforms = jax.random.uniform(jax.random.key(2), (draws, 2))
    tokens = draw_token(uniforms, jnp.broadcast_to(state, (draws, 8)), scoring, "float32")
    counts = np.bincount(tokens, minlength=vocab_size)
    expected = draws * np.asarray(jax.nn.softmax((state @ table.T)[0].at[jnp.array(banned)].set(-jnp.inf)))
    assert counts[list(banned)].sum() == 0
    likely = expected > 5
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    assert chi_square < likely.sum() + 4 * np.sqrt(2 * likely.sum())


def test_the_ends_of_the_unit_interval_give_tokens_that_can_occur():
    table = jnp.eye(70)[:, :8] * 200.0  # all but a few weights vanish
    states = jnp.eye(8)[jnp.array([3, 3, 7, 7])]
    ends = jnp.array([[0.0, 0.0], [1 - 2.0**-24, 1 - 2.0**-24]] * 2)
    np.testing.assert_array_equal(draw_token(ends, states, table, "float32"), [3, 3, 7, 7])
