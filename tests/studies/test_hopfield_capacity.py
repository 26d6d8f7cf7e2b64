"""The measurement of capacity: patterns are as described, and retrieved where they must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.errors import UsageError
from calm.rng import stream
from calm.studies import hopfield_capacity as capacity


def test_patterns_lie_on_their_sphere_and_lose_half():
    patterns = capacity.draw(jax.random.key(0), 50, 8)
    np.testing.assert_allclose(np.linalg.norm(patterns, axis=-1), 8**0.5, rtol=1e-5)
    halves = np.asarray(capacity.halved(jax.random.key(1), patterns))
    assert ((halves == 0).sum(-1) == 4).all() and ((halves == 0) | (halves == patterns)).all()
    assert (halves == 0).any(0).all()  # another half for each query


def test_one_pattern_is_always_found_and_many_cold_ones_as_often_as_the_nearest():
    key = stream(jax.random.key(0), "x")
    sizes = dict(width=6, queries=200, steps=(1, 5))
    assert capacity.retrieved(key, jnp.float32(1.0), count=1, **sizes).tolist() == [1.0, 1.0, 1.0]
    first, last, nearest = capacity.retrieved(key, jnp.float32(200.0), count=40, **sizes).tolist()
    assert 0 < first <= last + 0.05 and abs(last - nearest) < 0.05 and nearest < 0.9
    warm = capacity.retrieved(key, jnp.float32(0.01), count=40, **sizes).tolist()
    assert warm == [0.0, 0.0, nearest]  # everything is mixed with everything


def test_the_capacity_is_the_last_count_before_the_first_failure(tmp_path):
    rows = [
        {"width": 8, "count": count, "beta": 1.0, "after": [first, 1.0], "nearest": 1.0}
        for count, first in ((4, 0.95), (8, 0.91), (16, 0.5), (32, 0.99))
    ]
    assert capacity.capacities(rows) == [{"width": 8, "beta": 1.0, "after": [8, 32], "nearest": 32}]
    assert ">= 32" in capacity.capacity_table(capacity.capacities(rows), 32)


def test_a_small_measurement_leaves_table_and_picture(tmp_path):
    result = capacity.run(tmp_path, widths=(4, 12), counts=(2, 32), betas=(0.2, 4.0), queries=16)
    assert len(result["rows"]) == 8
    held = {(entry["width"], entry["beta"]): entry["nearest"] for entry in result["capacity"]}
    assert held[12, 4.0] >= held[4, 4.0]
    assert "C = 12" in (tmp_path / "hopfield-capacity.md").read_text()
    assert (tmp_path / "hopfield-capacity.png").stat().st_size > 1000
    with pytest.raises(UsageError, match="widths must be at least 2"):
        capacity.run(tmp_path, widths=(1,))
    with pytest.raises(UsageError, match="betas above 0"):
        capacity.run(tmp_path, betas=(0.0,))
