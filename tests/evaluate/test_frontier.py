"""The frontier's numbers are those of the sampler's exact law; sweeps share draws and are measured on a run."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from calm.core.laws import batch_law
from calm.errors import UsageError
from calm.evaluate.frontier import FrontierOptions
from calm.evaluate.sampling_frontier import frontier

P = np.array([0.4, 0.3, 0.2, 0.1])
CHUNKS = np.array([[0, 5], [0, 6], [1, 5], [2, 5]])  # the first two share their first token


def test_accuracy_and_collision_are_those_of_the_law_by_enumeration():
    rounds, temperatures, sizes = 20_000, (Fraction(1), Fraction(1, 2), Fraction(1, 3)), (3, 8)
    drawn = jax.random.categorical(jax.random.key(0), jnp.log(jnp.asarray(P)), shape=(rounds, 2, max(sizes)))
    pools, truth = jnp.asarray(CHUNKS, jnp.int32)[drawn], jnp.asarray(CHUNKS[1], jnp.int32)
    found = jax.jit(jax.vmap(lambda pools: frontier(pools, truth, temperatures, sizes)))(pools)
    mean, error = np.asarray(found.mean(0)), np.asarray(found.std(0)) / rounds**0.5
    for i, temperature in enumerate(temperatures):
        for j, size in enumerate(sizes):
            law = batch_law(P, temperature, size)
            first = np.array([law.law[:2].sum(), law.law[2], law.law[3]])
            expected = [first[0], law.law[1], (first**2).sum(), (law.law**2).sum(), law.fallback_share]
            assert (np.abs(mean[i, j] - expected) <= 5 * error[i, j] + 1e-6).all(), (temperature, size)


def test_a_run_has_a_frontier_and_a_picture(tiny_runs, tmp_path):
    words = ["--max-tokens", "768", "--positions", "4", "--temperatures", "1", "1/2", "--candidates", "2", "6"]
    result = tiny.run("frontier", str(tiny_runs / "lm"), *words, "--out", str(tmp_path))["frontier"]
    assert [(point["temperature"], point["candidates"]) for point in result["points"]] == [
        ("1", 2), ("1", 6), ("1/2", 2), ("1/2", 6)
    ]  # fmt: skip
    assert result["protocol"]["positions"] in (4, 8, 12, 16)  # four in every block
    for point in result["points"]:
        for name in ("accuracy", "collision"):
            values = [interval["estimate"] for interval in point[name]]
            assert len(values) == 4 and (np.diff(values) <= 1e-4).all() and 0 <= values[-1] <= values[0] <= 100.001
    assert (tmp_path / "frontier.png").stat().st_size > 5000 and (tmp_path / "frontier.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(temperatures=("0",)), "must be above 0"),
        (dict(temperatures=("1/20",)), "temperature 1/20 needs candidates >= 20, got candidates=10"),
        (dict(sizes=()), "at least one temperature, one number of candidates"),
        (dict(decoding="greedy"), "unknown decoding"),
    ],
)
def test_sweeps_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        FrontierOptions(**options)
