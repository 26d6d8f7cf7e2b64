"""FLOPs: the paper's printed figures, what XLA counts, and that everything a run does is in the sum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.objective import AutoencoderObjective, LatentLossConfig, LatentObjective
from calm.core.predictor import NextVector
from calm.evaluate.flops import CodecCost, NextVectorCost, Training, flops_line, next_vector_inference
from calm.runs import presets
from calm.token.model import TokenLMConfig
from calm.token.objective import TokenObjective

LLAMA_3 = 128_257
# CALM, arXiv:2510.27688: parameters without the autoencoder, FLOPs per generated token, FLOPs of training.
PUBLISHED = {"calm-m": (371e6, 2.9e8, 3.7e20), "calm-l": (735e6, 4.6e8, 7.7e20), "calm-xl": (1.82e9, 9.4e8, None)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_cost_what_the_paper_says(name):
    parameters, inference, training = PUBLISHED[name]
    preset = presets.get(name)
    codec = dataclasses.replace(preset.autoencoder.model, vocab_size=LLAMA_3)
    lm = dataclasses.replace(preset.lm.model, vocab_size=LLAMA_3, chunk_size=4, latent_dim=128)
    assert lm.parameters() == pytest.approx(parameters, rel=0.03)
    context, sizes = preset.lm.train.num_tokens // 4, preset.lm.train
    assert next_vector_inference(lm, codec, context).total == pytest.approx(inference, rel=0.05)
    if training is not None:  # the paper's figure for XL is lower than its own sizes give
        abstract = nnx.eval_shape(lambda: codec.build(rngs=nnx.Rngs(0)))
        per_token = LatentObjective(lm, preset.lm.loss, abstract, context=context).flops_per_token()
        run = Training(per_token=per_token, tokens=sizes.steps * sizes.batch_size * sizes.num_tokens)
        assert run.total == pytest.approx(training, rel=0.05)


CODEC = AutoencoderConfig(vocab_size=512, chunk_size=4, latent_dim=32, dim=128, inner_dim=320)
BACKBONE = BackboneConfig(dim=64, num_layers=4, num_heads=2, num_kv_heads=2, inner_dim=176)
LM = LatentLMConfig(vocab_size=512, chunk_size=4, latent_dim=32, backbone=BACKBONE, head=EnergyHeadConfig(num_blocks=2))
ROWS, CHUNKS = 4, 32  # 512 tokens: one block of rows where losses go over the vocabulary in blocks


def counted_by_xla(function, *arguments):
    """Operations of the whole program, elementwise ones included. Loops of one turn and written-out layers only."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


def abstract(config):
    return nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))))


def test_xla_counts_the_same_in_generation():
    (codec_graph, codec), (lm_graph, lm) = abstract(CODEC), abstract(LM)
    chunks = jax.ShapeDtypeStruct((ROWS, CHUNKS, 4), jnp.int32)

    def step(codec, lm, chunks):
        model = NextVector(nnx.merge(codec_graph, codec), nnx.merge(lm_graph, lm))
        hidden, _ = model.hidden(chunks)
        latents = model.lm.head(hidden, jnp.zeros((1, ROWS, CHUNKS, 64)))
        return model.autoencoder.logits(latents)

    ours = ROWS * CHUNKS * 4 * next_vector_inference(LM, CODEC, CHUNKS).total
    assert counted_by_xla(step, codec, lm, chunks) == pytest.approx(ours, rel=0.1)


@pytest.mark.parametrize("loss", [LatentLossConfig(), LatentLossConfig(auxiliary_weight=1.0)])
def test_xla_counts_the_same_in_training(loss):
    objective = LatentObjective(LM, loss, nnx.eval_shape(lambda: CODEC.build(rngs=nnx.Rngs(0))), context=CHUNKS)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((ROWS, 4 * (CHUNKS + 1)), jnp.int32)
    gradient = jax.grad(lambda *arguments: objective.loss(*arguments, jax.random.key(0), 0)[0])
    ours = ROWS * CHUNKS * 4 * objective.flops_per_token()
    assert counted_by_xla(gradient, params, objective.frozen, tokens) == pytest.approx(ours, rel=0.1)


@pytest.mark.parametrize("gradient", ["one_step", "full"])
def test_xla_counts_the_same_of_a_reasoner(gradient):
    """Under the one-step gradient the first segments have no backward pass."""
    backbone = BackboneConfig(dim=256, num_layers=2, pattern="HA", num_segments=3, reasoner_gradient=gradient)
    objective = TokenObjective(TokenLMConfig(vocab_size=512, backbone=backbone), context=64)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((ROWS, 65), jnp.int32)
    slope = jax.grad(lambda params, tokens: objective.loss(params, {}, tokens, jax.random.key(0))[0])
    ours = ROWS * 64 * objective.flops_per_token()
    assert counted_by_xla(slope, params, tokens) == pytest.approx(ours, rel=0.1)


def test_xla_counts_the_same_for_the_autoencoder():
    from calm.core.objective import AutoencoderLossConfig

    objective = AutoencoderObjective(CODEC, AutoencoderLossConfig(), mask_id=0)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((ROWS, 128), jnp.int32)
    gradient = jax.grad(lambda params, tokens: objective.loss(params, {}, tokens, jax.random.key(0))[0])
    ours = ROWS * 128 * objective.flops_per_token()
    assert counted_by_xla(gradient, params, tokens) == pytest.approx(ours, rel=0.1)


def test_candidates_cost_the_head_and_the_decoder_again_but_not_the_backbone():
    one, many = (next_vector_inference(LM, CODEC, CHUNKS, candidates) for candidates in (1, 200))
    assert many.backbone == one.backbone and many.head == 200 * one.head and many.writing == 200 * one.writing
    assert one.to_dict()["total"] == one.total == sum((one.backbone, one.head, one.writing))
    assert isinstance(LM, NextVectorCost) and isinstance(CODEC, CodecCost)


def test_what_came_before_is_in_the_total_and_stated_apart():
    run = Training(per_token=1e6, tokens=1000, before=5e8)
    assert run.total == 1.5e9 and run.amortised == pytest.approx(1.5e6) and run.to_dict()["before"] == 5e8
    line = flops_line(next_vector_inference(LM, CODEC, CHUNKS), run)
    assert "training 1.5e+09 FLOPs" in line and "5e+08 for the autoencoder" in line and "in the decoder" in line
    assert flops_line(None, None) == "" and np.isfinite(run.amortised)
