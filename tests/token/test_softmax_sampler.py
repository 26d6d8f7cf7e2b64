"""Sampling from probabilities: each filter keeps what its definition says, and draws have the law that is left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.sampler import StepKeys
from calm.errors import UsageError
from calm.token.sampler import SoftmaxSampler, softmax_sampler

P = np.array([0.4, 0.05, 0.3, 0.0, 0.15, 0.1])


class Silent:
    """A source that says no probabilities."""

    alive = jnp.ones(1, bool)

    def draw(self, keys, num_draws):
        raise AssertionError("a sampler that knows the law draws nothing")

    def repeats(self, chunks, length):
        raise AssertionError


class Known(Silent):
    """A source of one law, the same in every row."""

    def logits(self):
        return jnp.broadcast_to(jnp.log(jnp.asarray(P, jnp.float32)), (20_000, len(P)))


def law(sampler: SoftmaxSampler) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), 20_000)
    choice = jax.jit(lambda keys: sampler.sample(StepKeys(keys, keys), Known()))(keys)
    assert choice.chunk.shape == (20_000, 1) and not choice.fell_back.any() and (choice.draws == 1).all()
    return np.bincount(np.asarray(choice.chunk)[:, 0], minlength=len(P))


CASES = {
    "temperature 1": (dict(), P),
    "temperature 1/2": (dict(temperature=0.5), P**2),
    "temperature 2": (dict(temperature=2.0), P**0.5),
    "top 2": (dict(top_k=2), P * (P >= 0.3)),
    "top 1": (dict(top_k=1), P * (P >= 0.4)),
    "nucleus that ends inside the third": (dict(top_p=0.75), P * (P >= 0.15)),
    "nucleus of the first alone": (dict(top_p=0.39), P * (P >= 0.4)),
    "a quarter of the most probable": (dict(min_p=0.25), P * (P >= 0.1)),
    "temperature first: squares": (dict(temperature=0.5, min_p=0.25), P**2 * (P >= 0.3)),
    "nucleus of what the top 2 left": (dict(top_k=2, top_p=0.5), P * (P >= 0.4)),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_have_the_law_that_is_left(case):
    """Chi-square with at most 5 degrees of freedom, whose 99.99 % quantile is 25.7."""
    options, weights = CASES[case]
    counts, expected = law(SoftmaxSampler(**options)), 20_000 * weights / weights.sum()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 25.7


def test_a_source_without_probabilities_is_refused():
    with pytest.raises(UsageError, match="only a token model"):
        SoftmaxSampler().sample(StepKeys(jnp.zeros(1), jnp.zeros(1)), Silent())


def test_options_become_a_sampler():
    assert softmax_sampler("1/4", top_k=5, top_p=0.9) == SoftmaxSampler(temperature=0.25, top_k=5, top_p=0.9)
    assert softmax_sampler() == SoftmaxSampler()


@pytest.mark.parametrize(
    "bad",
    [dict(temperature=0.0), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(min_p=2.0)],
)
def test_bad_options_are_refused(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        SoftmaxSampler(**bad)
