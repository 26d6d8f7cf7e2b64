"""Checkpoints are compared by the objective: the mean over held-out rows, with the same noise every time."""

import jax
import jax.numpy as jnp
import numpy as np

from calm.train.validate import TOKENS_PER_BATCH, validator


class Recorded:
    """An objective whose loss is a known function of rows, weights, noise and step."""

    frozen = jnp.float32(10.0)

    def loss(self, params, frozen, tokens, key, step):
        noise = jax.random.normal(key)
        return params + frozen * tokens[:, 0].mean() + noise + step, {"noise": noise}


def test_it_is_the_mean_over_rows_whatever_the_batches_and_draws_the_same_noise_each_time():
    width = TOKENS_PER_BATCH // 4
    blocks = np.zeros((10, width), np.int64)  # batches of 4, 4 and 2 rows
    blocks[:, 0] = np.arange(10)
    key = jax.random.key(1)  # its three draws do not cancel, so a share is a measure of rounding
    validate = validator(Recorded(), blocks, key, step=100)
    noise = [float(jax.random.normal(jax.random.fold_in(key, start))) for start in (0, 4, 8)]
    expected = (4 * noise[0] + 4 * noise[1] + 2 * noise[2]) / 10
    assert abs(expected) > 0.4
    first, second = validate(jnp.float32(1.0)), validate(jnp.float32(2.0))
    np.testing.assert_allclose(first["noise"], expected, rtol=1e-6)
    np.testing.assert_allclose(first["objective"], 1 + 10 * 4.5 + expected + 100, rtol=1e-6)
    np.testing.assert_allclose(second["objective"] - first["objective"], 1.0, rtol=1e-5)
