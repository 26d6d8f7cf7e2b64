"""The convolution mixer: the laws of a mixer, the convolution of the textbook, and a reach of W - 1 positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixer_laws as laws
from calm.core.dense import PRECISIONS
from calm.errors import UsageError
from calm.hybrid.convolution import ConvSSMConfig, shifted_products
from random_models import normal

CONFIG = ConvSSMConfig(kernel=5, expand=2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_sequence_blocks_and_steps_are_equal(precision):
    laws.modes_are_equal(CONFIG, precision)


@pytest.mark.parametrize(
    "law",
    [
        laws.the_future_stays_away,
        laws.padding_leaves_no_trace,
        laws.branches_are_rewound_copies,
        laws.states_keep_their_size,
        laws.only_a_trail_goes_back,
        laws.costs_are_those_of_what_is_built,
    ],
)
def test_law(law):
    law(CONFIG)


@pytest.mark.parametrize(("kernel", "length"), [(2, 1), (7, 19), (15, 32)])
def test_shifted_products_are_a_depthwise_convolution(kernel, length):
    """Values and gradients, where the positions fold evenly and where they do not."""

    def reference(seen, taps):
        axes = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(seen, taps[:, None], (1,), "VALID", dimension_numbers=axes, feature_group_count=3)

    seen, taps = normal(2, length + kernel - 1, 3), normal(kernel, 3, seed=1)
    np.testing.assert_allclose(jax.jit(shifted_products)(seen, taps), reference(seen, taps), atol=1e-5)
    ours, theirs = (
        jax.jit(jax.grad(lambda *z, f=f: jnp.sin(f(*z)).sum(), (0, 1)))(seen, taps) for f in (shifted_products, reference)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_position_reads_itself_and_the_kernel_minus_one_before_it():
    mixer, changed = laws.built(CONFIG), laws.HIDDEN.copy()
    changed[:, 10] += 1.0
    out = [laws.CALL(mixer, x, None, laws.window())[0] for x in (laws.HIDDEN, changed)]
    assert np.flatnonzero(np.abs(out[0] - out[1]).max((0, 2))).tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize("changes", [{"kernel": 1}, {"expand": 0}])
def test_settings_that_mean_nothing_are_refused(changes):
    with pytest.raises(UsageError, match="kernel must be at least 2 and expand at least 1, got"):
        ConvSSMConfig(**changes)
