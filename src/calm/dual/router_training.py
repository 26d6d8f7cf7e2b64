"""What each of two models makes of every chunk of a text, and a router that learns to foretell the difference.

Both are scored after the true text before the chunk: in nats, CALM by the likelihood of the chunk averaged over S latents (a
bound, `calm.evaluate.nll_bound`), the token model exactly; and by Brier-1..4 of the tokens that come (`calm.evaluate.brier`). A
model that lets a router choose by the text before the chunk has, at that chunk, the score of the model chosen: so the scores of
every threshold follow from one pass of both, without sampling anew.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import ORDERS, TextProtocol, brier_intervals
from calm.core.intervals import bootstrap
from calm.core.predictor import NextVector
from calm.decoders.context_decoder import recent_tokens
from calm.dual.router import Router, RouterConfig
from calm.dual.routing_report import RoutingPoint, RoutingReport
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.boundaries import phases_of, targets_at
from calm.evaluate.brier import Places, _by_probabilities, _by_samples
from calm.rng import PRNGKey, stream
from calm.token.model import TokenLM

MEASURES = ("nats", "brier")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChunkScores:
    """Of every chunk of some blocks but the first, and the last whose four tokens reach beyond the block."""

    hidden: Float[np.ndarray, "R A D"]
    """what CALM's backbone made of the text before the chunk"""
    nats: Float[np.ndarray, "2 R A"]
    """-log p of the chunk's K tokens, by CALM (at most) and by the token model"""
    brier: Float[np.ndarray, "2 R A O"]
    """Brier-1..4 behind the boundary, not yet averaged: unbiased, and noisy one by one"""
    chunk_size: int

    def gap(self, measure: str) -> Float[np.ndarray, "R A"]:
        """CALM's error less the token model's: nats per token, or the mean of Brier-1..4 times -1."""
        if measure not in MEASURES:
            raise UsageError(f"router: measure must be {' or '.join(MEASURES)}, got {measure!r}")
        if measure == "nats":
            return (self.nats[0] - self.nats[1]) / self.chunk_size
        return (self.brier[1] - self.brier[0]).mean(-1)


def score_chunks(
    token_lm: TokenLM,
    predictor: NextVector,
    blocks: Int[np.ndarray, "R T"],
    key: PRNGKey,
    *,
    num_samples: int = 8,
    decoding: str | None = None,
) -> ChunkScores:
    """Both models on every chunk. `num_samples` latents stand behind CALM's nats, and continuations behind the Brier scores;
    `decoding` is how CALM's latents become tokens there.

    Raises:
        UsageError: fewer than 2 samples, or blocks that do not fit.
    """
    size, block_tokens = predictor.chunk_size, blocks.shape[1]
    checked(blocks, np.zeros(len(blocks), np.int64), size, None)
    if num_samples < 2:
        raise UsageError(f"num_samples must be at least 2, got {num_samples}")
    scored = block_tokens - max(0, size - ORDERS)  # the last chunk lies within the block
    (phase,), (of_tokens,) = phases_of(scored, size, size), phases_of(scored, 1, size)
    split = tuple(nnx.split(model) for model in (predictor, token_lm))
    graphs, params = tuple(part[0] for part in split), tuple(part[1] for part in split)
    decoding = decoding or predictor.decoding

    def score(tokens: np.ndarray, rows: np.ndarray) -> Any:
        keys = jax.vmap(partial(jax.random.fold_in, stream(key, "chunks")))(rows)
        targets = targets_at(tokens, phase.places)
        where = tuple(
            Places(jnp.asarray(chunks), jnp.asarray(targets), jnp.asarray(each.ends), jnp.asarray(each.weight), None)
            for chunks, each in ((phase.chunks(tokens, 0), phase), (tokens[..., None], of_tokens))
        )
        following = jnp.asarray(phase.next_chunks(tokens))
        return _score(graphs, params, where, following, keys, num_samples=num_samples, decoding=decoding)

    (hidden, nats, brier), _ = run_blocks(score, blocks, None)
    return ChunkScores(hidden=hidden, nats=np.moveaxis(nats, 1, 0), brier=np.moveaxis(brier, 1, 0), chunk_size=size)


@partial(jax.jit, static_argnames=("graphs", "num_samples", "decoding"))
def _score(
    graphs: Any,
    params: Any,
    where: tuple[Places, Places],
    following: Int[Array, "B A K"],
    keys: Array,
    *,
    num_samples: int,
    decoding: Any,
) -> tuple[Float[Array, "B A D"], Float[Array, "B 2 A"], Float[Array, "B 2 A O"]]:
    predictor, token_lm = (nnx.merge(graph, of_model) for graph, of_model in zip(graphs, params, strict=True))
    chunks, ends = where[0].chunks, where[0].ends
    hidden = predictor.hidden(chunks)[0][:, ends - 1]
    previous = recent_tokens(chunks, predictor.reach)[:, ends - 1]
    noise = jax.vmap(lambda key: predictor.draw_noise(stream(key, "nats"), (num_samples, len(ends))).latent, out_axes=1)(keys)
    log_probs = predictor.token_log_probs(hidden, previous, predictor.lm.head(hidden, noise), following).sum(-1)
    of_latents = np.log(len(log_probs)) - jax.nn.logsumexp(log_probs, axis=0)

    size = predictor.chunk_size
    tokens = where[1].chunks[..., 0]
    read = token_lm.hidden(where[1].chunks)[0][:, :-1]
    each, _ = token_lm.nats_and_match(read, tokens[:, 1:])
    at = where[1].ends[:, None] - 1 + jnp.arange(size)
    of_tokens = each[:, jnp.minimum(at, each.shape[1] - 1)].sum(-1)

    samples, _ = _by_samples(predictor, where[0], keys, keys[0], num_samples, decoding)
    known, _ = _by_probabilities(token_lm, where[1], keys, num_samples)
    return hidden, jnp.stack([of_latents, of_tokens], 1), jnp.stack([samples, known], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterTraining:
    """How a router is fitted."""

    measure: str = "nats"
    """the error whose difference is foretold: nats or brier"""
    inner_dim: int = 64
    steps: int = 600
    batch_size: int = 256
    """chunks a step"""
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    held_back: float = 0.2
    """share of the blocks, the last ones, on which the best step is chosen"""

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UsageError(f"router: measure must be {' or '.join(MEASURES)}, got {self.measure!r}")
        if min(self.inner_dim, self.steps, self.batch_size) < 1:
            raise UsageError("router: inner_dim, steps and batch_size must be at least 1")
        if not 0 < self.held_back < 1:
            raise UsageError(f"router: held_back must lie between 0 and 1, got {self.held_back}")


def train_router(scores: ChunkScores, key: PRNGKey, training: RouterTraining | None = None) -> Router:
    """A router fitted to the gap by AdamW on a Huber loss of the standardised gap, kept where it does best on blocks held back.

    The tails of a gap in nats are long, and what a threshold needs is the middle: hence Huber, not squares.

    Raises:
        UsageError: fewer than two blocks.
    """
    training = training or RouterTraining()
    gap = scores.gap(training.measure)
    rows, _, dim = scores.hidden.shape
    if rows < 2:
        raise UsageError(f"router: needs at least two blocks of text, one to fit and one to choose on, got {rows}")
    split = min(rows - 1, max(1, round(rows * (1 - training.held_back))))
    centre, spread = np.float32(gap[:split].mean()), np.float32(max(gap[:split].std(), 1e-6))
    inputs, wanted = jnp.asarray(scores.hidden), jnp.asarray((gap - centre) / spread, jnp.float32)
    fit, hold = ((inputs[part].reshape(-1, dim), wanted[part].reshape(-1)) for part in (slice(0, split), slice(split, None)))
    router = RouterConfig(dim=dim, inner_dim=training.inner_dim).build(rngs=nnx.Rngs(params=stream(key, "router")))
    graph, params = nnx.split(router)
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(training.learning_rate, training.steps), weight_decay=training.weight_decay
    )

    def loss(params: Any, hidden: Array, wanted: Array) -> Array:
        return optax.losses.huber_loss(nnx.merge(graph, params)(hidden), wanted).mean()

    @jax.jit
    def update(params: Any, moments: Any, step: Array) -> tuple[Any, Any]:
        rows = jax.random.randint(stream(key, "rows", step), (training.batch_size,), 0, len(fit[1]))
        gradient = jax.grad(loss)(params, fit[0][rows], fit[1][rows])
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    held = jax.jit(lambda params: loss(params, *hold))
    moments, best = optimizer.init(params), (float(held(params)), params)
    every = max(1, training.steps // 20)
    for step in range(training.steps):
        params, moments = update(params, moments, jnp.int32(step))
        if (step + 1) % every == 0 or step + 1 == training.steps:
            best = min(best, (float(held(params)), params), key=lambda pair: pair[0])
    fitted = nnx.merge(graph, best[1])
    # in the gap's own units: the last layer takes the scale
    assert fitted.out.bias is not None
    fitted.out.kernel[...] *= spread
    fitted.out.bias[...] = fitted.out.bias[...] * spread + centre
    return fitted


SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def thresholds(router: Router, scores: ChunkScores, shares: Sequence[float] = SHARES) -> dict[float, float]:
    """The thresholds above which these shares of the chunks of a text are the token model's. Set on another text than the one
    on which they are judged; a share is then met about.

    Raises:
        UsageError: a share outside 0..1.
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise UsageError(f"router: shares must lie between 0 and 1, got {list(shares)}")
    foretold = np.asarray(router(jnp.asarray(scores.hidden)))
    found = {share: float(np.quantile(foretold, 1 - share)) for share in shares}
    return found | {share: end for share, end in ((0.0, float("inf")), (1.0, float("-inf"))) if share in found}


def measure_routing(
    router: Router,
    scores: ChunkScores,
    document: Int[np.ndarray, "*r"],
    at: dict[float, float],
    *,
    costs: tuple[float, float],
    measure: str = "nats",
    text: TextProtocol,
    name: str = "router",
) -> RoutingReport:
    """The scores of the routed model at every threshold, on text that neither router nor thresholds have seen.

    Beside the router stand a coin of the same share, whose expected score is the mixture of both models', and an oracle that
    knows the gap of every chunk and spends the same share where it is largest: what no router passes. `costs` are the FLOPs per
    token of a chunk that CALM writes, and of one that the token model writes.
    """
    foretold, gap = np.asarray(router(jnp.asarray(scores.hidden)), np.float64), scores.gap(measure)
    rows, count = gap.shape
    size, block_tokens = scores.chunk_size, text.block_tokens
    ranks = np.argsort(np.argsort(-gap.reshape(-1))).reshape(gap.shape)

    def mixed(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Sums over each block where the token model has the weight `chosen`."""
        weight = chosen[..., None]
        both = values.reshape(2, rows, count, -1)
        return ((1 - weight) * both[0] + weight * both[1]).sum(1)

    def sums(total: np.ndarray) -> Any:
        return sums_of(total, count, document, block_tokens)

    points = []
    for share, threshold in at.items():
        chosen = (foretold > threshold).astype(np.float64)
        met = float(chosen.mean())
        coin, oracle = np.full(gap.shape, met), (ranks < chosen.sum()).astype(np.float64)
        nats = {who: mixed(of, scores.nats / size) for who, of in (("own", chosen), ("coin", coin), ("oracle", oracle))}
        interval, gain = bootstrap(
            sums(np.concatenate([nats["own"], nats["coin"] - nats["own"]], axis=1)),
            [lambda means: means[..., 0], lambda means: means[..., 1]],
        )
        points.append(
            RoutingPoint(
                asked=share,
                threshold=threshold,
                share=met,
                nats=interval,
                gain=gain,
                coin_nats=float(nats["coin"].sum() / gap.size),
                oracle_nats=float(nats["oracle"].sum() / gap.size),
                brier_lm=brier_intervals(sums(mixed(chosen, scores.brier))).brier_lm,
                coin_brier_lm=brier_intervals(sums(mixed(coin, scores.brier))).brier_lm.estimate,
                flops=(1 - met) * costs[0] + met * costs[1],
                steps=1 / size + met,
            )
        )
    correlation = float(np.corrcoef(foretold.reshape(-1), gap.reshape(-1))[0, 1]) if foretold.std() > 0 else 0.0
    return RoutingReport(name=name, protocol=text, measure=measure, points=tuple(points), correlation=correlation)
