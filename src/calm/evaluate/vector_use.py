"""Does the vector carry the text? The likelihood and Brier-n of a next-vector model under vectors that are not its own.

At every position the true next chunk x is scored given the text before it and one of five latents, in place of each other:

    own        S draws of the head at this position
    foreign    S draws of the head at the same place of another document
    previous   S draws of the head at the position before, in the same text
    zero       the zero vector
    true       the encoder's mean of x itself, which no model could know

nats(latents) is -log (1/S) sum_s p(x | z_s) over the tokens of x. With the model's own draws it bounds the model's negative
log-likelihood from above; S is the same for all five, so that differences compare like with like. The verdict is about
nats(foreign) - nats(own): a decoder that does not read its vector pays nothing for a foreign one.

Two rates say how much passes through the vector, in nats a chunk:

    of the text     K max(0, min(nats(foreign), nats(zero)) - nats(own))
                    an estimate. S draws make nats(own) too large and with it the rate too small; a decoder that was trained
                    without any vector could do better than this one with a wrong vector, which makes the rate too large.
    of the writing  E[log p(w | z_1) - log (1/S) sum_s p(w | z_s)],  w drawn from p(. | z_1)
                    a lower bound on the mutual information of the vector and the written chunk, given the text before it;
                    at most log S.

A decoder that no likelihood trained gives a wrong token a probability near 0; it is smoothed as in
`calm.evaluate.likelihood`.

Source: the measure is ours; the second rate is the multi-sample bound of Poole et al. 2019, arXiv:1905.06922.
"""

import dataclasses
import math
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import ORDERS, TextProtocol, brier_argmax
from calm.core.chunk_decoder import DECODINGS, recent_tokens
from calm.core.intervals import BlockSums, Interval, Statistic, bootstrap
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.likelihood import fit_share, log_mean_exp, smoothed
from calm.evaluate.ngram import Unigram
from calm.evaluate.tables import interval_text, table
from calm.rng import PRNGKey, stream

USED, UNUSED = 0.3, 0.05  # nats a token that a foreign vector costs

Kind = Literal["own", "foreign", "previous", "zero", "true"]
KINDS: dict[Kind, str] = {
    "own": "its own",
    "foreign": "of another text",
    "previous": "of the position before",
    "zero": "zero",
    "true": "of the true chunk, by the encoder",
}
Verdict = Literal["used", "weak", "unused", "no vector", "not measured"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoVectorUse:
    """The reason why nothing was measured: the model has no vector, or there is too little text."""

    name: str
    reason: str
    verdict: Literal["no vector", "not measured"] = "no vector"
    label: ClassVar[str] = ""

    @property
    def finding(self) -> str:
        return self.reason

    def scalars(self) -> dict[str, float]:
        return {}

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "verdict": self.verdict, "label": self.label, "reason": self.reason}

    def table(self, *, markdown: bool = False) -> str:
        return f"{self.name}: {self.verdict}; {self.reason}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VectorUse:
    """Scores of one model under its own and under other vectors.

    Attributes:
        sums: for each block and, in the order of KINDS, nats a chunk by S draws, nats a chunk of a single draw, Brier-1..O;
            then the rate of the writing. Each over the block's positions.
        num_samples: S. decoding: how latents became the tokens of Brier-n.
        share: of the unigram in every token's probability; None where the decoder was not smoothed. fitted_on: the text on
            which it was chosen.
        same_document: share of the blocks whose foreign latents are of the same document, for want of another.
    """

    name: str
    protocol: TextProtocol
    sums: BlockSums
    num_samples: int
    decoding: str
    share: float | None = None
    fitted_on: str = ""
    same_document: float = 0.0
    tokens_per_second: float | None = None

    @property
    def orders(self) -> int:
        """O: the orders of Brier-n that one chunk has."""
        return min(self.protocol.chunk_size, ORDERS)

    def _column(self, kind: Kind, measure: int = 0) -> int:
        return list(KINDS).index(kind) * (2 + self.orders) + measure

    @cached_property
    def _intervals(self) -> list[Interval]:
        """Every statistic of this report, from one resampling: the columns, then the costs, then the rates."""
        size, own = self.protocol.chunk_size, self._column("own")
        columns: list[Statistic] = [lambda means, i=i: means[..., i] for i in range(self.sums.total.shape[1])]
        others = [self._column(kind) for kind in KINDS]
        costs: list[Statistic] = [lambda means, i=i: (means[..., i] - means[..., own]) / size for i in others]
        without = [self._column("foreign"), self._column("zero")]
        rate: Statistic = lambda means: np.maximum(means[..., without].min(-1) - means[..., own], 0)  # noqa: E731
        return bootstrap(self.sums, [*columns, *costs, rate])

    def nats(self, kind: Kind) -> Interval:
        """Nats a token by S draws: -log of the mean of p(chunk | latent), over K."""
        return self._intervals[self._column(kind)].scaled(1 / self.protocol.chunk_size)

    def nats_of_one(self, kind: Kind) -> Interval:
        """Nats a token of a single draw, averaged over the draws."""
        return self._intervals[self._column(kind, 1)].scaled(1 / self.protocol.chunk_size)

    def brier_n(self, kind: Kind) -> list[Interval]:
        """Brier-1..O times 100, within the chunk after each position."""
        first = self._column(kind, 2)
        return [interval.scaled(100.0) for interval in self._intervals[first : first + self.orders]]

    def cost(self, kind: Kind) -> Interval:
        """nats(kind) - nats(own), by paired bootstrap."""
        return self._intervals[self.sums.total.shape[1] + list(KINDS).index(kind)]

    @property
    def rate(self) -> Interval:
        """Nats of each chunk of the text that pass through the vector: an estimate (see the module)."""
        return self._intervals[-1]

    @property
    def written_rate(self) -> Interval:
        """Nats of each written chunk that the vector decides: a lower bound, at most log S (see the module)."""
        return self._intervals[self.sums.total.shape[1] - 1]

    @property
    def verdict(self) -> Verdict:
        """`used` where a foreign vector costs at least USED nats a token, `unused` below UNUSED, `weak` between."""
        cost = self.cost("foreign").estimate
        return "used" if cost >= USED else "unused" if cost < UNUSED else "weak"

    @property
    def label(self) -> str:
        """Name of an unused model for tables; empty where the vector is used or weak.

        A decoder that gains nothing from the true vector either is a decoder without a vector. One that does gain reads its
        vector; then it is the head whose vectors hold no text.
        """
        if self.verdict != "unused":
            return ""
        gain = min(self.nats("foreign").estimate, self.nats("zero").estimate) - self.nats("true").estimate
        return "decoder without a vector" if gain < UNUSED else "vectors without text"

    def scalars(self) -> dict[str, float]:
        """The estimates alone, without the bootstrap: for a table of another report."""
        size, means = self.protocol.chunk_size, self.sums.means
        nats = {kind: float(means[self._column(kind)]) / size for kind in KINDS}
        return {f"nats_{kind}": value for kind, value in nats.items()} | {
            "vector_cost": nats["foreign"] - nats["own"],
            "vector_rate": size * max(0.0, min(nats["foreign"], nats["zero"]) - nats["own"]),
            "written_rate": float(means[-1]),
        }

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "label": self.label,
            "protocol": {**self.protocol.to_dict(), "samples": self.num_samples, "decoding": self.decoding},
            "cost": self.cost("foreign").to_dict(),
            "rate": self.rate.to_dict(),
            "written_rate": self.written_rate.to_dict(),
            "latents": {
                kind: {
                    "nats_per_token": self.nats(kind).to_dict(),
                    "nats_per_token_of_one": self.nats_of_one(kind).to_dict(),
                    "brier_n": [interval.to_dict() for interval in self.brier_n(kind)],
                    "cost": self.cost(kind).to_dict(),
                }
                for kind in KINDS
            },
            "smoothing_share": self.share,
            "smoothing_fitted_on": self.fitted_on,
            "foreign_from_the_same_document": self.same_document,
            "scored_tokens": int(self.sums.count.sum()) * self.protocol.chunk_size,
            "tokens_per_second": self.tokens_per_second,
        }

    @property
    def finding(self) -> str:
        """The cost and what follows from it, in one line."""
        named = f", {self.label}" if self.label else ""
        return f"a foreign vector costs {interval_text(self.cost('foreign'), 3)} nats a token: {self.verdict}{named}"

    def table(self, *, markdown: bool = False) -> str:
        """One row a kind of latent with 95 % intervals; the verdict and the rates below it."""
        header = ["vector", "nats/token", "of one draw", "cost", *[f"Brier-{n + 1}" for n in range(self.orders)]]
        rows = []
        for kind, words in KINDS.items():
            cells = [self.nats(kind), self.nats_of_one(kind), None if kind == "own" else self.cost(kind), *self.brier_n(kind)]
            rows.append([words, *(interval_text(cell, 3) for cell in cells)])
        below = [
            f"{self.name}: {self.finding} (used from {USED}, unused below {UNUSED})",
            f"through the vector: about {interval_text(self.rate, 2)} nats of each chunk of the text (estimate), at least "
            f"{interval_text(self.written_rate, 2)} of each written chunk (bound, at most {math.log(self.num_samples):.2f})",
            f"{self.protocol.line()}, S={self.num_samples}, {self.decoding} decoding, {self.to_dict()['scored_tokens']} tokens",
        ]
        if self.share is not None:
            below.append(f"decoder smoothed by {100 * self.share:.2g} % of the unigram, fitted on {self.fitted_on}")
        if self.same_document:
            below.append(
                f"{self.same_document:.0%} of the blocks have no other document: their foreign vectors are of the same one"
            )
        return "\n".join([table(header, rows, markdown=markdown), "", *below])


def enough_text(blocks: int, chunks: int) -> bool:
    """Whether so many blocks of so many chunks hold another text and a position before."""
    return blocks >= 2 and chunks >= 3


def measure_vector_use(
    predictor: Any,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    unigram: Unigram | None = None,
    calibration: Int[np.ndarray, "Q T"] | None = None,
    fitted_on: str = "",
    num_samples: int = 8,
    decoding: str | None = None,
    batch_size: int | None = None,
    text: TextProtocol | None = None,
    name: str = "CALM",
) -> VectorUse:
    """Scores held-out blocks under the model's own and under other vectors, and judges whether its vector is used.

    Args:
        predictor: `calm.core.predictor.NextVector`, or a module with its `hidden`, `draw_noise`, `write_latents`,
            `token_log_probs`, `lm.head` and `autoencoder.encode`.
        blocks, document: token blocks, and the document that each begins in; a block's first chunk is only context.
        unigram, calibration, fitted_on: needed where `predictor.decoding` is argmax, whose decoder is smoothed: a model fitted
            on the training text, blocks that choose the share and are not scored, and a description of these.
        num_samples: S. decoding: of the tokens of Brier-n; None: what suits the model.

    Raises:
        UsageError: fewer than 2 samples, 2 blocks or 3 chunks a block, an unknown decoding, or a decoder to be smoothed without
            a unigram or calibration text that is not scored.
    """
    size = predictor.chunk_size
    text = checked(blocks, document, size, text)
    decoding = decoding or predictor.decoding
    if decoding not in DECODINGS:
        raise UsageError(f"decoding must be {' or '.join(DECODINGS)}, got {decoding!r}")
    if num_samples < 2:
        raise UsageError(f"vector use: num_samples must be at least 2, got {num_samples}")
    if not enough_text(len(blocks), blocks.shape[1] // size):
        raise UsageError(
            f"vector use: needs 2 blocks of 3 chunks, so that there is another text and a position before; got {len(blocks)} "
            f"blocks of {blocks.shape[1] // size} chunks"
        )
    share = None
    if predictor.decoding == "argmax":
        if unigram is None or calibration is None or not len(calibration):
            raise UsageError("vector use: this decoder was not trained by likelihood; give a unigram and calibration blocks")
        if {row.tobytes() for row in calibration.astype(np.int32)} & {row.tobytes() for row in blocks.astype(np.int32)}:
            raise UsageError("vector use: a block that is scored cannot also choose the smoothing; hold some blocks back")
        share = fit_share(predictor, calibration, stream(key, "share"), unigram=unigram, num_samples=num_samples)
    graph, params = nnx.split(predictor)
    draw, score = stream(key, "own"), stream(key, "score")
    latents, _ = run_blocks(
        lambda tokens, rows: _draw(graph, params, tokens, rows, draw, num_samples=num_samples), blocks, batch_size
    )
    other = other_texts(document)
    known = jnp.zeros(predictor.vocab_size) if unigram is None else jnp.log(jnp.asarray(unigram.probability, jnp.float32))
    run = partial(_score, graph, params, decoding=decoding, share=share)
    totals, rate = run_blocks(
        lambda tokens, rows: run(tokens, rows, score, latents[rows], latents[other[rows]], known), blocks, batch_size
    )
    return VectorUse(
        name=name,
        protocol=text,
        sums=sums_of(totals, blocks.shape[1] // size - 1, document, blocks.shape[1]),
        num_samples=num_samples,
        decoding=decoding,
        share=share,
        fitted_on=fitted_on if share is not None else "",
        same_document=float(np.mean(document == document[other])),
        tokens_per_second=rate,
    )


def other_texts(document: Int[np.ndarray, "R"]) -> Int[np.ndarray, "R"]:
    """For each block another one, of another document where there is any: the first such at or after half the way round."""
    count = len(document)
    shifts = np.roll(np.arange(1, count), 1 - count // 2)  # from half way round on, then those before
    others = (np.arange(count)[:, None] + shifts) % count
    differs = document[others] != document[:, None]
    return others[np.arange(count), differs.argmax(1)]


@partial(jax.jit, static_argnames=("graph", "num_samples"))
def _draw(
    graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"], key: PRNGKey, *, num_samples: int
) -> Float[Array, "B S N Z"]:
    """The head's own draws at every position but the last."""
    predictor: Any = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, predictor.chunk_size)
    hidden, _ = predictor.hidden(chunks[:, :-1])
    keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
    shape = (num_samples, hidden.shape[1])
    noise = jax.vmap(lambda key: predictor.draw_noise(key, shape).latent, out_axes=1)(keys)
    return jnp.moveaxis(predictor.lm.head(hidden, noise), 1, 0)


@partial(jax.jit, static_argnames=("graph", "decoding", "share"))
def _score(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    rows: Int[Array, "B"],
    key: PRNGKey,
    own: Float[Array, "B S N Z"],
    foreign: Float[Array, "B S N Z"],
    log_unigram: Float[Array, "V"],
    *,
    decoding: str,
    share: float | None,
) -> Float[Array, "B F"]:
    """Sums over the positions of each block, in the order of `VectorUse.sums`."""
    predictor: Any = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, predictor.chunk_size)
    targets = chunks[:, 1:]
    hidden, _ = predictor.hidden(chunks[:, :-1])
    previous = recent_tokens(chunks[:, :-1], predictor.reach)
    own, foreign = jnp.moveaxis(own, 1, 0), jnp.moveaxis(foreign, 1, 0)
    before = jnp.concatenate([own[:, :, 1:2], own[:, :, :-1]], axis=2)  # the first position has none before it: the one after
    true = jnp.broadcast_to(predictor.autoencoder.encode(targets).mean, own.shape)
    keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
    shape = (len(own), *targets.shape[1:], 2)
    # The same uniforms under every kind of latent: a decoder that ignores them writes the same tokens.
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, shape), out_axes=1)(keys)

    def measure(latents: Float[Array, "S B N Z"]) -> Float[Array, "B X"]:
        log_probs = predictor.token_log_probs(hidden, previous, latents, targets)
        if share is not None:
            log_probs = smoothed(log_probs, log_unigram[targets], share)
        nats = -log_probs.sum(-1)
        written = predictor.write_latents(
            hidden, previous, latents, uniforms if decoding == "drawn" else None, decoding=decoding
        )
        brier = brier_argmax(written, targets)
        return jnp.concatenate([-log_mean_exp(-nats)[..., None], nats.mean(0)[..., None], brier], axis=-1).sum(1)

    kinds: dict[Kind, Array] = {"own": own, "foreign": foreign, "previous": before, "zero": jnp.zeros_like(own), "true": true}
    measured = jax.lax.map(measure, jnp.stack([kinds[kind] for kind in KINDS]))
    written = predictor.write_latents(hidden, previous, own[:1], uniforms[:1], decoding="drawn")[0]
    log_probs = predictor.token_log_probs(hidden, previous, own, written).sum(-1)
    rate = (log_probs[0] - log_mean_exp(log_probs)).sum(1, keepdims=True)
    return jnp.concatenate([jnp.moveaxis(measured, 0, 1).reshape(len(tokens), -1), rate], axis=1)
