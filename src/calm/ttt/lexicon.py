"""A critic of the words that the decoder expects to write: are they as topical as those of text about the topic?

A direction in latent space can be followed by latents that mean nothing as text: a decoder may ignore how long a latent is
in that direction, or that it is short in all others (docs/log.md). Here a token w has the weight

    a_w = log p(w | text about it) / p(w | other text)

the evidence of naive Bayes in nats, and the reward is a function of the decoder's distributions p of a trajectory's tokens.
Asking for as much evidence as possible spoils the text: function words vanish, then one word is repeated. So two numbers
should match those of text about the topic, from above and below. With c_w = 0 for the commonest tokens, which make up half
of all text, and 1 for the others,

    level    E = sum p(w) a_w c_w / sum p(w) c_w    mean evidence of the content words
    share    C = mean of p(w) c_w                   share of content words, the rest being function words

    reward = -|E - level| - |C - share|

in nats a word, at most 0. Its gradient in a latent passes through the decoder, and is 0 where the decoder ignores the
latent. The tokens before a position are those that the future itself wrote, as constants. A probe for bags of words is the
critic of PPLM (Dathathri et al. 2020, arXiv:1912.02164), which also adapts while it writes; there words are listed by hand
with equal weights and their probability has no upper bound; a penalty holds the model back instead.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.dense import Precision, matmul
from calm.core.predictor import NextVector
from calm.decoders.context_decoder import ContextDecoder
from calm.errors import UsageError
from calm.text.chunking import NOTHING

PRIOR, MOST = 4.0, 3.0
"""pseudo-counts that shrink a token's shares towards those of all text, and the largest evidence of a token, in nats"""
FUNCTION_SHARE, FOLDS = 0.5, 5
"""share of all text made up by the commonest tokens, taken as function words; folds of the cross-validation"""


class Topic(NamedTuple):
    """Token statistics of text about a topic."""

    evidence: Float[np.ndarray, "V"]
    """nats of each token for the topic; 0 for function words"""
    content: Float[np.ndarray, "V"]
    """1, and 0 for function words"""
    level: float
    """mean evidence of content words in held-out text about the topic"""
    share: float
    """share of content words in that text"""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("evidence", "content", "level", "share", "table", "params"),
    meta_fields=("graphdef", "precision"),
)
@dataclasses.dataclass(frozen=True)
class LexiconCritic:
    """Minus the distance of the expected words from text about a topic, in nats a word."""

    reads_chunks: ClassVar[bool] = True
    evidence: Float[Array, "V"]
    content: Float[Array, "V"]
    level: Float[Array, ""]
    share: Float[Array, ""]
    table: Float[Array, "V W"]
    params: Any
    graphdef: Any
    """of the context decoder, or of the autoencoder where there is none"""
    precision: Precision

    def __call__(self, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"]) -> Float[Array, "S B"]:
        evidence, content = self.expected(latents, chunks)
        return -jnp.abs(evidence - self.level) - jnp.abs(content - self.share)

    def expected(
        self, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"]
    ) -> tuple[Float[Array, "S B"], Float[Array, "S B"]]:
        """Mean evidence of a content word, in nats, and share of content words, of each trajectory."""
        decoder = nnx.merge(self.graphdef, self.params)
        if isinstance(decoder, ContextDecoder):
            rows = latents.reshape(-1, *latents.shape[2:])
            text = jnp.pad(chunks.reshape(-1, *chunks.shape[2:]), ((0, 0), (1, 0), (0, 0)), constant_values=NOTHING)
            plan = decoder.plan(rows, rows[None])  # reads no hidden state, as `of` requires
            states = decoder.over_text(plan, text)[0]
        else:
            states = decoder.decode_states(latents)
        logits = matmul(states.reshape(-1, states.shape[-1]), self.table.T, self.precision)
        both = jax.nn.softmax(logits, axis=-1) @ jnp.stack([self.evidence * self.content, self.content], axis=1)
        said, content = jnp.moveaxis(both.reshape(*latents.shape[:2], -1, 2).mean(2), -1, 0)
        return said / jnp.maximum(content, 1e-6), content

    @staticmethod
    def of(predictor: NextVector, topic: Topic) -> "LexiconCritic":
        """Builds the critic of a model's own decoder.

        Raises:
            UsageError: the decoder also reads the hidden state, which a trajectory of latents does not have.
        """
        writer = predictor.lm.context_decoder
        if writer is not None and writer.reads_hidden:
            raise UsageError(
                "concept: this model's context decoder also reads the hidden state, so that what it writes does not follow "
                "from latents alone"
            )
        graphdef, params = nnx.split(predictor.autoencoder if writer is None else writer)
        return LexiconCritic(
            evidence=jnp.asarray(topic.evidence, jnp.float32),
            content=jnp.asarray(topic.content, jnp.float32),
            level=jnp.float32(topic.level),
            share=jnp.float32(topic.share),
            table=predictor.table,
            params=params,
            graphdef=graphdef,
            precision=predictor.precision,
        )


def topic_of(about: Sequence[Int[np.ndarray, "_"]], other: Sequence[Int[np.ndarray, "_"]], vocab_size: int) -> Topic:
    """Learns a topic from passages `about` it and `other` passages.

    Level and share are cross-validated over consecutive parts of the passages, so that names of a single article do not set
    a level that no other text about the topic reaches.

    Raises:
        UsageError: one kind of passages has no token.
    """
    kinds = [[passage for passage in kind if passage.size] for kind in (about, other)]
    if not all(kinds):
        raise UsageError("concept: needs text about it and other text, one of which has no token")
    folds = min(FOLDS, *map(len, kinds))
    counts = np.stack([[_counted(part, vocab_size) for part in _parts(kind, folds)] for kind in kinds])  # [kind fold V]
    total = counts.sum((0, 1))
    order = np.argsort(-total, kind="stable")
    common = order[np.cumsum(total[order]) < FUNCTION_SHARE * total.sum()]
    content = np.ones(vocab_size, np.float32)
    content[common] = 0.0
    said = held = 0.0
    for fold in range(folds):
        known = counts.sum(1) - (counts[:, fold] if folds > 1 else 0.0)
        held_out = counts[0, fold] * content
        said, held = said + float(held_out @ evidence_of(*known)), held + float(held_out.sum())
    level = said / max(held, 1.0)
    return Topic(evidence_of(*counts.sum(1)) * content, content, level, held / counts[0].sum())


def evidence_of(about: Float[np.ndarray, "V"], other: Float[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    """Evidence of each token for one kind of text against the other, from its counts in both: the log ratio of its shares in
    nats, clipped to `MOST`. `PRIOR` shrinks that of rare tokens towards 0."""
    counts = np.stack([about, other])
    length = counts.sum(1, keepdims=True)
    expected = counts.sum(0) * length / length.sum()  # were there no difference
    prior = PRIOR * length / length.sum()
    ratio = (counts + prior) / (expected + prior)
    return np.clip(np.log(ratio[0] / ratio[1]), -MOST, MOST).astype(np.float32)


def _parts(passages: Sequence[Int[np.ndarray, "_"]], count: int) -> list[Sequence[Int[np.ndarray, "_"]]]:
    ends = [len(passages) * fold // count for fold in range(count + 1)]
    return [passages[begin:end] for begin, end in itertools.pairwise(ends)]


def _counted(passages: Sequence[Int[np.ndarray, "_"]], vocab_size: int) -> Float[np.ndarray, "V"]:
    return np.bincount(np.concatenate(passages), minlength=vocab_size).astype(np.float64)
