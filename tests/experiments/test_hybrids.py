"""The study of hybrids: models of one size, and what their states weigh."""

import dataclasses

import pytest

from calm.errors import UsageError
from calm.experiments import hybrids
from calm.experiments.hybrids import equal_size, state_bytes
from calm.models import LatentLMConfig
from calm.nn import BackboneConfig

BACKBONE = BackboneConfig(dim=64, num_layers=2, inner_dim=172)
MODEL = LatentLMConfig(vocab_size=300, chunk_size=4, latent_dim=8, backbone=BACKBONE)


@pytest.mark.parametrize("pattern", ["A", "H", "SHA", "C,H"])
def test_a_pattern_of_equal_size_is_as_large_within_three_per_cent(pattern):
    found = equal_size(MODEL, pattern)
    weights = dataclasses.replace(MODEL, backbone=found).parameters()
    assert weights == pytest.approx(MODEL.parameters(), rel=0.03)
    assert found.pattern == pattern and found.dim % (2 * found.num_heads) == 0
    if pattern == "A":
        assert found == BACKBONE
    if pattern == "SHA":
        assert found.dim < BACKBONE.dim


def test_a_size_that_no_width_has_is_refused(monkeypatch):
    monkeypatch.setattr(hybrids, "NEAR", -1.0)
    with pytest.raises(UsageError, match="pattern 'SHA': no width gives [0-9,]+ weights; the nearest, "):
        equal_size(MODEL, "SHA")


def test_states_are_counted_in_bytes():
    def size(pattern, context):
        return state_bytes(dataclasses.replace(BACKBONE, pattern=pattern), context)

    assert size("A", 16) == 2 * 2 * 64 * 16 * 4  # layers, keys and values, D, context, float32
    assert size("A", 32) == 2 * size("A", 16) and size("S", 32) == size("S", 16) > 0
    assert size("SA", 16) == size("S", 16) + size("A", 16)
