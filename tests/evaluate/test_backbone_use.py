"""Use of the backbone: models whose head cannot or must look at it, equality with a plain computation, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm.core.autoencoder import AutoencoderConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector
from calm.core.transformer import TransformerConfig
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.errors import UsageError
from calm.evaluate.backbone_use import KINDS, measure_backbone_use
from calm.evaluate.ngram import Unigram
from calm.evaluate.vector_use import other_texts
from calm.rng import stream
from random_models import random_model

V, K, S = 8, 2, 4
SIZES = dict(vocab_size=V, chunk_size=K, latent_dim=6)
LM = LatentLMConfig(
    **SIZES,
    backbone=TransformerConfig(dim=8, num_layers=1, num_heads=1, num_kv_heads=1, inner_dim=8),
    head=EnergyHeadConfig(num_blocks=1, noise_dim=4),
    head_reads_chunk=True,
)
BLOCKS = np.random.default_rng(0).integers(0, V, (12, 10)).astype(np.int32)
DOCUMENT = np.repeat(np.arange(6), 2)
KEY = jax.random.key(3)
SMOOTHED = dict(
    unigram=Unigram.from_counts(np.bincount(BLOCKS.reshape(-1), minlength=V)),
    calibration=np.random.default_rng(1).integers(0, V, (4, 10)).astype(np.int32),
)


def predictor(config=LM):
    return NextVector(random_model(AutoencoderConfig(**SIZES, dim=8, inner_dim=8)), random_model(config))


def measured(model, **options):
    return measure_backbone_use(model, BLOCKS, DOCUMENT, KEY, **dict(num_samples=S) | SMOOTHED | options)


def test_a_head_that_sees_the_last_chunk_alone_is_the_same_under_every_output():
    model = predictor()
    scale = model.lm.backbone.norm.scale
    scale[...] = jnp.zeros_like(scale[...])  # the backbone's output is 0 everywhere
    use = measured(model)
    rows = use.sums.total.reshape(len(BLOCKS), len(KINDS), -1)
    np.testing.assert_allclose(rows, rows[:, :1].repeat(len(KINDS), 1), atol=1e-4)
    assert use.verdict == "not read" and abs(use.cost("foreign").estimate) < 1e-5 and "not read" in use.table()


def test_sums_equal_a_plain_computation():
    model = predictor(dataclasses.replace(LM, context_decoder=ContextDecoderConfig(dim=8, window=3, table_dim=8, inner_dim=8)))
    use = measured(model, batch_size=5, unigram=None, calibration=None)
    chunks, other = jnp.asarray(BLOCKS.reshape(12, -1, K)), other_texts(DOCUMENT)
    read, direct = chunks[:, :-1], model.lm.read_directly(chunks[:, :-1])
    hidden = model.hidden(read)[0]
    backbone = np.asarray(hidden - direct)
    states = {"own": backbone, "foreign": backbone[other], "mean": backbone.mean((0, 1)), "zero": 0 * backbone}
    for kind, state in states.items():
        nats = 0.0
        for row in range(12):
            noise = model.draw_noise(jax.random.fold_in(stream(KEY, "draw"), row), (S, 4), "drawn")
            here = jnp.broadcast_to(state, backbone.shape)[row] + direct[row]
            before = np.full((4, 3), -1, np.int32)
            for place in range(4):
                known = BLOCKS[row, : (place + 1) * K][-3:]
                before[place, 3 - len(known) :] = known
            latents = model.lm.head(here, noise.latent)
            log_probs = model.token_log_probs(here, jnp.asarray(before), latents, chunks[row, 1:]).sum(-1)
            nats -= np.log(np.exp(np.asarray(log_probs, np.float64)).mean(0)).sum()
        assert use.nats(kind).estimate == pytest.approx(nats / (12 * 4 * K), rel=1e-4), kind
    assert use.share is None and use.cost("own").estimate == 0 and len(use.brier_n("mean")) == K


def test_results_do_not_depend_on_the_batch():
    model = predictor()
    np.testing.assert_allclose(measured(model, batch_size=1).sums.total, measured(model).sums.total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_samples=1), "num_samples must be at least 2"),
        (dict(unigram=None), "give a unigram and calibration blocks"),
    ],
)
def test_bad_input_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        measured(predictor(), **options)
    with pytest.raises(UsageError, match="needs 2 blocks of 3 chunks, got 1 of 5 chunks"):
        measure_backbone_use(predictor(), BLOCKS[:1], DOCUMENT[:1], KEY, **SMOOTHED)
