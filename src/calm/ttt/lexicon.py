"""A critic that reads what the decoder makes of latents: is what it expects to write as topical as text about the topic is?

A direction in latent space can be followed by latents that mean nothing as text: a decoder is free to ignore how long a latent
is in that direction, or that it is short in all others (docs/log.md). Here a token w weighs what it says about the topic,

    a_w = log p(w | text about it) / p(w | other text)

the evidence of naive Bayes in nats, and what counts is the decoder's own distributions p of the tokens of a trajectory. Asking
for as much evidence as possible gets it at the price of the text: first the function words go, then one word is said again and
again. So two things are asked for, and more of either is as bad as less. With c_w = 1 for words with a meaning of their own and
0 for the commonest tokens, which make up half of all text,

    level    E = sum p(w) a_w c_w / sum p(w) c_w    as in text about the topic: what such words are about
    share    C = mean of p(w) c_w                   as in such text: how many there are, function words being the rest

    reward = -|E - level| - |C - share|

in nats a word, at most 0. Its slope in a latent is by what the decoder would write, and is 0 where the latent says nothing to
it. The tokens before a place are those that the future itself wrote, and stand as constants. A probe for bags of words is the
critic of PPLM (Dathathri et al. 2020, arXiv:1912.02164), which also adapts while it writes; there the words are listed by hand,
weigh the same, and their probability has no upper end; a penalty holds the model back instead.
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
"""occurrences by which a token's shares are drawn towards those of all text, and the most evidence of a token, in nats"""
FUNCTION_SHARE, FOLDS = 0.5, 5
"""how much of all text its commonest tokens make up that are function words, and parts of the text for cross-validation"""


class Topic(NamedTuple):
    """What text about a topic is like, token by token."""

    evidence: Float[np.ndarray, "V"]
    """nats that a token says for the topic; 0 for function words"""
    content: Float[np.ndarray, "V"]
    """1, and 0 for function words"""
    level: float
    """mean evidence of the content in text about the topic that the evidence was not learned from"""
    share: float
    """how much of that text is content"""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("evidence", "content", "level", "share", "table", "params"),
    meta_fields=("graphdef", "precision"),
)
@dataclasses.dataclass(frozen=True)
class LexiconCritic:
    """Minus the distance between what is expected to be written and text about a topic, in nats a word."""

    reads_chunks: ClassVar[bool] = True
    evidence: Float[Array, "V"]
    content: Float[Array, "V"]
    level: Float[Array, ""]
    share: Float[Array, ""]
    table: Float[Array, "V W"]
    params: Any
    graphdef: Any
    """of what writes chunks: the context decoder, or the autoencoder"""
    precision: Precision

    def __call__(self, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"]) -> Float[Array, "S B"]:
        evidence, content = self.expected(latents, chunks)
        return -jnp.abs(evidence - self.level) - jnp.abs(content - self.share)

    def expected(
        self, latents: Float[Array, "S B N Z"], chunks: Int[Array, "S B N K"]
    ) -> tuple[Float[Array, "S B"], Float[Array, "S B"]]:
        """Of each trajectory: nats of evidence in a word of content, and the share of content."""
        decoder = nnx.merge(self.graphdef, self.params)
        if isinstance(decoder, ContextDecoder):
            rows = latents.reshape(-1, *latents.shape[2:])
            text = jnp.pad(chunks.reshape(-1, *chunks.shape[2:]), ((0, 0), (1, 0), (0, 0)), constant_values=NOTHING)
            plan = decoder.plan(rows, rows[None])  # it reads no hidden state: `of` sees to that
            states = decoder.over_text(plan, text)[0]
        else:
            states = decoder.decode_states(latents)
        logits = matmul(states.reshape(-1, states.shape[-1]), self.table.T, self.precision)
        both = jax.nn.softmax(logits, axis=-1) @ jnp.stack([self.evidence * self.content, self.content], axis=1)
        said, content = jnp.moveaxis(both.reshape(*latents.shape[:2], -1, 2).mean(2), -1, 0)
        return said / jnp.maximum(content, 1e-6), content

    @staticmethod
    def of(predictor: NextVector, topic: Topic) -> "LexiconCritic":
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
    """What passages `about` a topic have that `other` passages have not.

    Level and share are cross-validated over consecutive parts of the passages, so that names which only one article has do not
    set a level that no other text about the topic reaches.

    Raises:
        UsageError: no token of a kind.
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
    """What each token says for one kind of text and against the other, from how often either has it: log of the ratio of its
    shares, in nats, at most `MOST` either way. A token that is rare in both says little, for each share has the `PRIOR` of
    all text."""
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
