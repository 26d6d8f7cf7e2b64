"""A random token model and next-vector models of the same small vocabulary, sensitive to what they read."""

import functools

import jax.numpy as jnp
import numpy as np
from flax import nnx

from calm.core.autoencoder import AutoencoderConfig
from calm.core.energy_head import EnergyHeadConfig
from calm.core.generate import SpecialIds
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector
from calm.core.transformer import TransformerConfig
from calm.decoders.context_decoder import ContextDecoderConfig
from calm.token.model import TokenLM, TokenLMConfig
from calm.token.sampler import SoftmaxSampler
from random_models import random_model

V, K = 6, 3
SPECIAL = SpecialIds(begin_id=0, end_id=V, mask_id=1)  # no end: rows go on to the limit
MASK = np.where(np.isin(np.arange(V), [SPECIAL.begin_id, SPECIAL.mask_id]), -np.inf, 0.0)
BACKBONE = TransformerConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=2, inner_dim=8)
WRITERS = {
    "none": None,
    "both": ContextDecoderConfig(dim=8, inner_dim=8, num_layers=1, table_dim=6, window=2, recall=4),
    "hidden": ContextDecoderConfig(dim=8, inner_dim=8, num_layers=1, table_dim=6, window=1, use_latent=False),
}


@functools.cache
def models(writer: str) -> tuple[TokenLM, NextVector]:
    codec = random_model(AutoencoderConfig(vocab_size=V, chunk_size=K, latent_dim=4, dim=6, inner_dim=8), seed=1)
    head = EnergyHeadConfig(num_blocks=1, noise_dim=4)
    sizes = dict(vocab_size=V, chunk_size=K, latent_dim=4, backbone=BACKBONE, head=head)
    lm = random_model(LatentLMConfig(**sizes, context_decoder=WRITERS[writer]), seed=2)
    # with random weights, drafts hardly depend on hidden state and latent; scale those weights up
    writer_from = [] if writer == "none" else [lm.context_decoder.from_hidden, lm.context_decoder.from_latent]
    block = lm.head.blocks.layer
    for factor, layers in (
        (3.0, (block.from_hidden, block.down)),
        (6.0, (lm.head.out, codec.decoder.from_latent, *writer_from)),
    ):
        for layer in filter(None, layers):
            layer.kernel[...] *= factor
    token_lm = random_model(TokenLMConfig(vocab_size=V, backbone=BACKBONE, tied=False), seed=3)
    token_lm.head.table[...] *= 0.5
    return token_lm, NextVector(codec, lm)


@nnx.jit
def _logits(token_lm: TokenLM, tokens, at):
    return token_lm.logits(token_lm.hidden(tokens[None, :, None])[0][0, at])


def logits_after(token_lm: TokenLM, text: list[int], *, started: bool = False) -> np.ndarray:
    """Logits of the next token, the text being read at once; `started` with the empty prompt, which is a begin id."""
    tokens = np.array([SPECIAL.begin_id] * started + text)
    return np.asarray(_logits(token_lm, jnp.asarray(np.pad(tokens, (0, 24 - len(tokens)))), len(tokens) - 1))


def choose(sampler: SoftmaxSampler, logits: np.ndarray, numbers: np.ndarray) -> int:
    """The token that two uniform numbers choose; with so few tokens the second one alone decides."""
    weights = np.asarray(sampler.weights(jnp.asarray(logits + MASK, jnp.float32)[None])[0])
    return int(np.searchsorted(np.cumsum(weights), numbers[1] * weights.sum(), side="right"))
