"""A package outside calm adds a head, a mixer, a term and a decoder by registering them; configurations then name them."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float

from calm import config
from calm.core.autoencoder import AutoencoderConfig
from calm.core.dense import Dense
from calm.core.head import Head, HeadConfig
from calm.core.latent_lm import LatentLMConfig
from calm.core.mixer import MixerConfig
from calm.core.objective import LatentLossConfig, LatentObjective, Term
from calm.hybrid.backbone import HybridConfig

SIZES = dict(vocab_size=12, chunk_size=2, latent_dim=3)
CODEC = AutoencoderConfig(**SIZES, dim=4, inner_dim=4)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 12, (2, 12)), jnp.int32)


@HeadConfig.register("toy: a fixed spread around a linear map")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyHeadConfig(HeadConfig):
    spread: float = 0.5

    def build(self, dim, latent_dim, *, rngs, precision="float32"):
        return ToyHead(self, dim, latent_dim, rngs=rngs, precision=precision)

    def flops(self, dim, latent_dim, num_samples):
        return 2 * dim * latent_dim


class ToyHead(Head):
    def __init__(self, config, dim, latent_dim, *, rngs, precision):
        self.noise_dim, self.spread = latent_dim, config.spread
        self.linear = Dense(dim, latent_dim, precision=precision, rngs=rngs)

    def draw_noise(self, key, shape):
        return jax.random.normal(key, (*shape, self.noise_dim))

    def __call__(self, hidden, noise):
        return self.linear(hidden) + self.spread * noise


@MixerConfig.register("T")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyMixerConfig(MixerConfig):
    """The running mean of the past."""

    scale: float = 1.0

    def build(self, dim, *, rngs, precision="float32"):
        return ToyMixer(self.scale)

    def parameters(self, dim):
        return 0

    def flops(self, dim, context):
        return 2 * dim


class ToyMixer(nnx.Module):
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, hidden: Float[Array, "B N D"], state, window):
        return self.scale * jnp.cumsum(hidden, axis=1) / jnp.arange(1, hidden.shape[1] + 1)[:, None], state


@Term.register("toy: length")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthTerm(Term):
    """Keeps samples short."""

    trains_head: ClassVar[bool] = True

    def values(self, inputs):
        return {self.kind: inputs.mean(jnp.square(inputs.samples).sum(-1).mean(0))}


def test_a_head_a_mixer_and_a_term_from_outside_train_together():
    named = {
        **SIZES,
        "backbone": {"kind": "hybrid", "dim": 8, "num_layers": 2, "num_heads": 2, "inner_dim": 8, "pattern": "TA"},
        "head": {"kind": "toy: a fixed spread around a linear map", "spread": 0.25},
    }
    model = config.from_dict(LatentLMConfig, named | {"backbone": named["backbone"] | {"num_kv_heads": 1}})
    assert isinstance(model.backbone, HybridConfig) and model.backbone.mixers["T"] == ToyMixerConfig()
    loss = config.from_dict(LatentLossConfig, {"num_samples": 4, "terms": {"toy: length": {"weight": 0.5}}})
    assert config.from_dict(LatentLMConfig, config.to_dict(model)) == model
    objective = LatentObjective(model, loss, CODEC.build(rngs=nnx.Rngs(0)), context=5)
    params = objective.init(jax.random.key(0))
    (value, terms), slope = jax.value_and_grad(objective.loss, has_aux=True)(
        params, objective.frozen, TOKENS, jax.random.key(1)
    )
    assert value == pytest.approx(float(terms["energy"] + 0.5 * terms["toy: length"]), rel=1e-5)
    assert float(jnp.abs(slope["lm"]["head"]["linear"]["kernel"][...]).sum()) > 0
    assert objective.flops_per_token() > 0


def test_a_term_of_weight_0_is_measured_and_not_trained():
    model = LatentLMConfig(
        **SIZES, head=ToyHeadConfig(), backbone=HybridConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=2, pattern="T")
    )
    codec = CODEC.build(rngs=nnx.Rngs(0))
    with_it, without = (
        LatentObjective(model, loss, codec, context=5)
        for loss in (LatentLossConfig().with_terms(LengthTerm(weight=0.0)), LatentLossConfig())
    )
    params = without.init(jax.random.key(0))
    (value, terms), (alone, _) = (
        objective.loss(params, objective.frozen, TOKENS, jax.random.key(1)) for objective in (with_it, without)
    )
    assert value == alone and terms["toy: length"] > 0
