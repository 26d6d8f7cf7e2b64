"""The hybrid presets have the sizes of the models that they are after; counted on shapes, nothing is allocated."""

import dataclasses

import pytest

from calm.runs import presets

WORDS = 267_735  # of WikiText-103


@pytest.mark.parametrize(("name", "vocab_size", "millions"), [("hybrid-107m", WORDS, 107), ("hybrid-97m", 32_768, 97)])
def test_the_large_ones_have_the_published_number_of_weights(name, vocab_size, millions):
    run = presets.get(name).token_lm
    model = dataclasses.replace(run.model, vocab_size=vocab_size)
    assert model.parameters() == pytest.approx(millions * 1e6, rel=0.02)
    assert (model.backbone.num_layers, model.backbone.num_segments, run.train.steps) == (8, 3, 25_000)
    assert model.tied and model.backbone.groups == ("SHA",)


def test_the_small_ones_keep_all_but_the_backbone():
    for name, base in (("hybrid-tiny", "quickstart"), ("wikitext2-tiny-hybrid", "wikitext2-tiny")):
        hybrid, plain = presets.get(name), presets.get(base)
        assert hybrid.lm.model.backbone.pattern == hybrid.token_lm.model.backbone.pattern == "SHA"
        assert dataclasses.replace(hybrid.lm.model, backbone=plain.lm.model.backbone) == plain.lm.model
        assert (hybrid.autoencoder, hybrid.lm.train, hybrid.lm.loss) == (plain.autoencoder, plain.lm.train, plain.lm.loss)
        assert hybrid.token_lm.train == plain.token_lm.train
        assert 3 * plain.lm.model.backbone.parameters() > hybrid.lm.model.backbone.parameters() < 8e6
