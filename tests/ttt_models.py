"""Small next-vector models of random weights, prompts and critics for the tests of `calm.ttt`."""

import jax.numpy as jnp
import numpy as np

from calm.core.autoencoder import AutoencoderConfig
from calm.core.backbone import BackboneConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.generate import SpecialIds
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.ttt.critic import ConceptCritic
from random_models import random_model

V, K, Z = 37, 3, 6
SPECIAL = SpecialIds(begin_id=34, end_id=35, mask_id=36)
PROMPTS = [np.arange(7), np.array([], np.int64), np.arange(20) % 11]
WRITER = ContextDecoderConfig(dim=12, inner_dim=16, num_layers=1, table_dim=8, window=4)


def next_vector(stem: str = "discrete", writer: ContextDecoderConfig | None = None, precision: str = "float32") -> NextVector:
    sizes = dict(vocab_size=V, chunk_size=K, latent_dim=Z)
    codec = AutoencoderConfig(**sizes, dim=8, inner_dim=12)
    backbone = BackboneConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, inner_dim=24)
    head = EnergyHeadConfig(num_blocks=1, noise_dim=4)
    model = LatentLMConfig(**sizes, stem=stem, backbone=backbone, head=head, context_decoder=writer)
    return NextVector(random_model(codec, precision=precision), random_model(model, seed=1, precision=precision))


def concept(seed: int = 0) -> ConceptCritic:
    direction = np.random.default_rng(seed).standard_normal(Z)
    return ConceptCritic(jnp.zeros(Z), jnp.asarray(direction / np.linalg.norm(direction), jnp.float32))
