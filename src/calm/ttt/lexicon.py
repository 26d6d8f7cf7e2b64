"""A critic that reads what the decoder makes of latents: how much the words that it expects belong to a topic.

A direction in latent space can be followed by latents that mean nothing as text: a decoder is free to ignore how long a latent
is in that direction, or that it is short in all others (docs/log.md). Here a token w weighs what it says about the topic,

    a_w = log p(w | text about it) / p(w | other text)

the evidence of naive Bayes in nats, and the reward is its mean under the decoder's own distributions,

    mean_{n, k} sum_w p(w | z_n, tokens before) a_w

so that its slope in z_n is by what the decoder would write, and is 0 where a latent says nothing to it. The tokens before a
place are those that the future itself wrote, and stand as constants. A probe of hidden states for bags of words is the
critic of PPLM (Dathathri et al. 2020, arXiv:1912.02164), which also adapts while it writes; there the words are listed by
hand and weigh the same.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.errors import UsageError
from calm.models import NextVector
from calm.models.context_decoder import ContextDecoder
from calm.nn.dense import Precision, matmul
from calm.text.chunking import NOTHING

PRIOR, MOST = 4.0, 3.0
"""occurrences by which a token's shares are drawn towards those of all text, and the most evidence of a token, in nats"""


@partial(jax.tree_util.register_dataclass, data_fields=("evidence", "table", "params"), meta_fields=("graphdef", "precision"))
@dataclasses.dataclass(frozen=True)
class LexiconCritic:
    """Mean evidence for a topic in what is expected to be written, in nats a token."""

    reads_chunks: ClassVar[bool] = True
    evidence: Float[Array, "V"]
    table: Float[Array, "V W"]
    params: Any
    graphdef: Any
    """of what writes chunks: the context decoder, or the autoencoder"""
    precision: Precision

    def __call__(self, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"]) -> Float[Array, "S B"]:
        decoder = nnx.merge(self.graphdef, self.params)
        if isinstance(decoder, ContextDecoder):
            rows = latents.reshape(-1, *latents.shape[2:])
            text = jnp.pad(chunks.reshape(-1, *chunks.shape[2:]), ((0, 0), (1, 0), (0, 0)), constant_values=NOTHING)
            plan = decoder.plan(rows, rows[None])  # it reads no hidden state: `of` sees to that
            states = decoder.over_text(plan, text)[0]
        else:
            states = decoder.decode_states(latents)
        logits = matmul(states.reshape(-1, states.shape[-1]), self.table.T, self.precision)
        expected = jax.nn.softmax(logits, axis=-1) @ self.evidence
        return expected.reshape(*latents.shape[:2], -1).mean(-1)

    @staticmethod
    def of(predictor: NextVector, evidence: Float[np.ndarray, "V"]) -> "LexiconCritic":
        """The critic of a model's own decoder.

        Raises:
            UsageError: its decoder reads the hidden state as well, which a future of latents does not have.
        """
        writer = predictor.lm.context_decoder
        if writer is not None and writer.config.use_hidden:
            raise UsageError(
                "concept: this model's context decoder also reads the hidden state, so that what it writes does not follow "
                "from latents alone"
            )
        graphdef, params = nnx.split(predictor.autoencoder if writer is None else writer)
        return LexiconCritic(jnp.asarray(evidence, jnp.float32), predictor.table, params, graphdef, predictor.precision)


def evidence_of(about: Int[np.ndarray, "*a"], other: Int[np.ndarray, "*b"], vocab_size: int) -> Float[np.ndarray, "V"]:
    """What each token says for the kind of text that is `about` a topic and against the `other` kind: log of the ratio of its
    shares, in nats, at most `MOST` either way. A token that is rare in both says little, for each share has the `PRIOR` of
    all text.

    Raises:
        UsageError: no token of a kind.
    """
    if not about.size or not other.size:
        raise UsageError("concept: needs text about it and other text, one of which has no token")
    counts = np.stack([np.bincount(kind.ravel(), minlength=vocab_size) for kind in (about, other)]).astype(np.float64)
    length = counts.sum(1, keepdims=True)
    expected = counts.sum(0) * length / length.sum()  # were there no difference
    prior = PRIOR * length / length.sum()
    ratio = (counts + prior) / (expected + prior)
    return np.clip(np.log(ratio[0] / ratio[1]), -MOST, MOST).astype(np.float32)
