"""Is the backbone read? The likelihood and Brier-n of a next-vector model under hidden states that are not its own.

A model may write well and not look beyond its last chunk: where the tokens of the last chunk reach head or decoder on a way of
their own (`head_reads_chunk`, the window of a context decoder), the backbone can be left out of account, as the vector can be
by a decoder inside the chunk (`calm.evaluate.vector_use`). At every position head and decoder are given one of four outputs of
the backbone; what the last chunk gives directly stays that of the text.

    own        of the text before the position
    foreign    at the same place of another document
    mean       the mean over all positions of the scored text
    zero       zeros, which training never showed: a constant that was learned is missing too

The verdict is about nats(foreign) - nats(own), with the bounds of the vector. `foreign` mixes two things, that the text is
missing and that another contradicts it; `mean` has the first alone.
"""

import dataclasses
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import ORDERS, TextProtocol, brier_argmax
from calm.core.chunk_decoder import recent_tokens
from calm.core.intervals import BlockSums, Interval, Statistic, bootstrap
from calm.core.predictor import NextVector
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.likelihood import fit_share, log_mean_exp, smoothed
from calm.evaluate.ngram import Unigram
from calm.evaluate.tables import interval_text, table
from calm.evaluate.vector_use import UNUSED, USED, enough_text, other_texts
from calm.rng import PRNGKey, stream

Kind = Literal["own", "foreign", "mean", "zero"]
KINDS: dict[Kind, str] = {"own": "its own", "foreign": "of another text", "mean": "the mean", "zero": "zero"}
Verdict = Literal["read", "weak", "not read"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneUse:
    """Scores of one model under its own and under other outputs of its backbone.

    Attributes:
        sums: for each block and, in the order of KINDS, nats a chunk by S draws and Brier-1..O, over the block's positions.
        num_samples: S. share: of the unigram in every token's probability; None where the decoder was not smoothed.
    """

    name: str
    protocol: TextProtocol
    sums: BlockSums
    num_samples: int
    share: float | None = None

    @property
    def orders(self) -> int:
        """O: the orders of Brier-n that one chunk has."""
        return min(self.protocol.chunk_size, ORDERS)

    def _column(self, kind: Kind, measure: int = 0) -> int:
        return list(KINDS).index(kind) * (1 + self.orders) + measure

    @cached_property
    def _intervals(self) -> list[Interval]:
        columns: list[Statistic] = [lambda means, i=i: means[..., i] for i in range(self.sums.total.shape[1])]
        own, others = self._column("own"), [self._column(kind) for kind in KINDS]
        costs: list[Statistic] = [lambda means, i=i: means[..., i] - means[..., own] for i in others]
        return bootstrap(self.sums, [*columns, *costs])

    def nats(self, kind: Kind) -> Interval:
        """Nats a token by S draws of the head under this output."""
        return self._intervals[self._column(kind)].scaled(1 / self.protocol.chunk_size)

    def brier_n(self, kind: Kind) -> list[Interval]:
        """Brier-1..O times 100, within the chunk after each position."""
        first = self._column(kind, 1)
        return [interval.scaled(100.0) for interval in self._intervals[first : first + self.orders]]

    def cost(self, kind: Kind) -> Interval:
        """nats(kind) - nats(own) a token, by paired bootstrap."""
        place = self.sums.total.shape[1] + list(KINDS).index(kind)
        return self._intervals[place].scaled(1 / self.protocol.chunk_size)

    @property
    def verdict(self) -> Verdict:
        """`read` where a foreign output costs at least USED nats a token, `not read` below UNUSED, `weak` between."""
        cost = self.cost("foreign").estimate
        return "read" if cost >= USED else "not read" if cost < UNUSED else "weak"

    @property
    def finding(self) -> str:
        """The cost and what follows from it, in one line."""
        return f"another text's output of it costs {interval_text(self.cost('foreign'), 3)} nats a token: {self.verdict}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "protocol": {**self.protocol.to_dict(), "samples": self.num_samples},
            "outputs": {
                kind: {
                    "nats_per_token": self.nats(kind).to_dict(),
                    "brier_n": [interval.to_dict() for interval in self.brier_n(kind)],
                    "cost": self.cost(kind).to_dict(),
                }
                for kind in KINDS
            },
            "smoothing_share": self.share,
            "scored_tokens": int(self.sums.count.sum()) * self.protocol.chunk_size,
        }

    def table(self, *, markdown: bool = False) -> str:
        """One row a kind of output with 95 % intervals; the verdict below it."""
        header, rows = ["backbone's output", "nats/token", "cost", *[f"Brier-{n + 1}" for n in range(self.orders)]], []
        for kind, words in KINDS.items():
            cells = [self.nats(kind), None if kind == "own" else self.cost(kind), *self.brier_n(kind)]
            rows.append([words, *(interval_text(cell, 3) for cell in cells)])
        finding = (
            f"{self.name}: the backbone's output for another text costs {interval_text(self.cost('foreign'), 3)} nats a token: "
            f"{self.verdict} (read from {USED}, not read below {UNUSED})"
        )
        below = [finding]
        if self.share is not None:
            below.append(
                f"decoder smoothed by {100 * self.share:.2g} % of the unigram, which hides most costs in nats: see Brier-1"
            )
        return "\n".join([table(header, rows, markdown=markdown), "", *below])


def measure_backbone_use(
    predictor: NextVector,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    unigram: Unigram | None = None,
    calibration: Int[np.ndarray, "Q T"] | None = None,
    num_samples: int = 8,
    batch_size: int | None = None,
    text: TextProtocol | None = None,
    name: str = "CALM",
) -> BackboneUse:
    """Scores held-out blocks under the backbone's own and under other outputs.

    Args:
        blocks, document: token blocks, and the document that each begins in; a block's first chunk is only context.
        unigram, calibration: needed where the decoder is smoothed, as in `calm.evaluate.vector_use`.
        num_samples: S.

    Raises:
        UsageError: fewer than 2 samples, 2 blocks or 3 chunks a block, or a decoder to be smoothed without unigram and
            calibration text.
    """
    size = predictor.chunk_size
    text = checked(blocks, document, size, text)
    if num_samples < 2:
        raise UsageError(f"backbone use: num_samples must be at least 2, got {num_samples}")
    if not enough_text(len(blocks), blocks.shape[1] // size):
        raise UsageError(f"backbone use: needs 2 blocks of 3 chunks, got {len(blocks)} of {blocks.shape[1] // size} chunks")
    share = None
    if predictor.decoding == "argmax":
        if unigram is None or calibration is None or not len(calibration):
            raise UsageError("backbone use: this decoder was not trained by likelihood; give a unigram and calibration blocks")
        share = fit_share(predictor, calibration, stream(key, "share"), unigram=unigram, num_samples=num_samples)
    graph, params = nnx.split(predictor)
    outputs, _ = run_blocks(lambda tokens, rows: _backbone(graph, params, tokens), blocks, batch_size)
    mean, other = jnp.asarray(outputs.mean((0, 1))), other_texts(document)
    known = jnp.zeros(predictor.vocab_size) if unigram is None else jnp.log(jnp.asarray(unigram.probability, jnp.float32))
    draw = stream(key, "draw")

    def score(tokens: np.ndarray, rows: np.ndarray) -> Array:
        foreign = outputs[other[rows]]
        return _score(graph, params, tokens, rows, draw, foreign, mean, known, num_samples=num_samples, share=share)

    totals, _ = run_blocks(score, blocks, batch_size)
    sums = sums_of(totals, blocks.shape[1] // size - 1, document, blocks.shape[1])
    return BackboneUse(name=name, protocol=text, sums=sums, num_samples=num_samples, share=share)


@partial(jax.jit, static_argnames=("graph",))
def _backbone(graph: Any, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B N D"]:
    """The backbone's output at every position but the last."""
    predictor: Any = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, predictor.chunk_size)[:, :-1]
    return predictor.hidden(chunks)[0] - predictor.lm.read_directly(chunks)


@partial(jax.jit, static_argnames=("graph", "num_samples", "share"))
def _score(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    rows: Int[Array, "B"],
    key: PRNGKey,
    foreign: Float[Array, "B N D"],
    mean: Float[Array, "D"],
    log_unigram: Float[Array, "V"],
    *,
    num_samples: int,
    share: float | None,
) -> Float[Array, "B F"]:
    """Sums over the positions of each block, in the order of `BackboneUse.sums`; all kinds are given the same noise."""
    predictor: Any = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, predictor.chunk_size)
    read, targets = chunks[:, :-1], chunks[:, 1:]
    previous, decoding = recent_tokens(read, predictor.reach), predictor.decoding
    hidden, direct = predictor.hidden(read)[0], predictor.lm.read_directly(read)
    keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
    noise = jax.vmap(lambda key: predictor.draw_noise(key, (num_samples, read.shape[1]), decoding), out_axes=1)(keys)

    def measure(hidden: Float[Array, "B N D"]) -> Float[Array, "B X"]:
        latents = predictor.lm.head(hidden, noise.latent)
        log_probs = predictor.token_log_probs(hidden, previous, latents, targets)
        if share is not None:
            log_probs = smoothed(log_probs, log_unigram[targets], share)
        written = predictor.write_latents(hidden, previous, latents, noise.uniforms, decoding=decoding)
        nats = -log_mean_exp(log_probs.sum(-1))
        return jnp.concatenate([nats[..., None], brier_argmax(written, targets)], axis=-1).sum(1)

    kinds: dict[Kind, Array] = {
        "own": hidden,
        "foreign": foreign + direct,
        "mean": jnp.broadcast_to(mean, hidden.shape) + direct,
        "zero": direct,
    }
    measured = jax.lax.map(measure, jnp.stack([kinds[kind] for kind in KINDS]))
    return jnp.moveaxis(measured, 0, 1).reshape(len(tokens), -1)
