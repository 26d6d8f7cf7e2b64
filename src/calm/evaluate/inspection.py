"""The latents of an autoencoder on held-out text: accuracy under noise, spread and KL by dimension, smoothness."""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.plots import COLOURS, Path, new_figure, tidy
from calm.evaluate.reconstruction import LatentMoments, latent_moments
from calm.evaluate.tables import interval_text, table
from calm.rng import PRNGKey, stream

LEVELS = tuple(round(0.1 * level, 1) for level in range(11))
PLACES = tuple(round(0.1 * place, 1) for place in range(11))
UNITS = {
    "latent": "latent units",
    "posterior": "the posterior's own std (sigma)",
    "aggregate": "the aggregate std",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseCurve:
    """Accuracy of decoding the posterior mean plus noise, over its standard deviation in one unit."""

    unit: str
    """latent, posterior or aggregate: the last two dimension by dimension"""
    levels: list[float]
    tokens: list[Interval]
    chunks: list[Interval]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Tokens decoded on the line from one chunk's latent to another's: shares, by place on the line."""

    places: list[float]
    start: list[float]
    """equal to the first chunk's token there"""
    end: list[float]
    """equal to the second's; places where both chunks have the same token are left out"""

    @property
    def foreign(self) -> list[float]:
        """Equal to neither."""
        return [max(0.0, 1 - a - b) for a, b in zip(self.start, self.end, strict=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Distances between posterior means, per dimension in units of the aggregate standard deviation (root mean square)."""

    posterior_draw: float
    """from a mean to a draw of its posterior, which the decoder must tolerate"""
    one_token: float
    """to the same chunk with one token replaced by any other"""
    all_tokens: float
    """to another chunk of the text"""

    @property
    def smoothness(self) -> float:
        """one_token / all_tokens: sqrt(1/K) where every token has its own share of the latent, 1 where any change moves all."""
        return self.one_token / max(self.all_tokens, 1e-12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderInspection:
    """Everything that `calm inspect autoencoder` shows. Arrays have one entry a dimension.

    A dimension is active when its posterior mean varies over text (variance above .01), else collapsed.
    """

    name: str
    protocol: TextProtocol
    curves: list[NoiseCurve]
    sampled_tokens: Interval
    sampled_chunks: Interval
    kl: Float[np.ndarray, "Z"]
    posterior_std: Float[np.ndarray, "Z"]
    aggregate_std: Float[np.ndarray, "Z"]
    variance_of_means: Float[np.ndarray, "Z"]
    effective_rank: float
    participation_ratio: float
    interpolation: Interpolation
    neighbours: Neighbours

    @property
    def active(self) -> int:
        return int((self.variance_of_means > 0.01).sum())

    @property
    def collapsed(self) -> int:
        return len(self.kl) - self.active

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        for curve, source in zip(values["curves"], self.curves, strict=True):
            curve["tokens"], curve["chunks"] = ([i.to_dict() for i in part] for part in (source.tokens, source.chunks))
        values["sampled_tokens"], values["sampled_chunks"] = self.sampled_tokens.to_dict(), self.sampled_chunks.to_dict()
        for name in ("kl", "posterior_std", "aggregate_std", "variance_of_means"):
            values[name] = getattr(self, name).tolist()
        values["neighbours"]["smoothness"] = self.neighbours.smoothness
        return values | {"active_dimensions": self.active, "collapsed_dimensions": self.collapsed}

    def table(self, *, markdown: bool = False) -> str:
        rows = []
        for curve in self.curves:
            for level, tokens, chunks in zip(curve.levels, curve.tokens, curve.chunks, strict=True):
                if level or curve is self.curves[0]:
                    label = f"mean + {level:g} x {UNITS[curve.unit]}" if level else "posterior mean"
                    rows.append([label, interval_text(tokens.scaled(100.0)), interval_text(chunks.scaled(100.0))])
        rows.insert(
            1,
            [
                "a draw of the posterior",
                interval_text(self.sampled_tokens.scaled(100.0)),
                interval_text(self.sampled_chunks.scaled(100.0)),
            ],
        )
        near, way = self.neighbours, self.interpolation
        middle = len(way.places) // 2
        facts = [
            ["dimensions", f"{len(self.kl)}: {self.active} active, {self.collapsed} collapsed"],
            ["effective rank", f"{self.effective_rank:.1f} (participation ratio {self.participation_ratio:.1f})"],
            ["KL, nats a chunk", f"{self.kl.sum():.1f}; a dimension {_spread(self.kl)}"],
            ["posterior std (sigma)", _spread(self.posterior_std)],
            ["aggregate std", _spread(self.aggregate_std)],
            ["distance, in aggregate std", f"posterior draw {near.posterior_draw:.2f}, one token changed {near.one_token:.2f}, "
             f"another chunk {near.all_tokens:.2f} (smoothness {near.smoothness:.2f})"],
            ["half way to another chunk", f"{way.start[middle]:.0%} of tokens are the first chunk's, {way.end[middle]:.0%} the "
             f"second's, {way.foreign[middle]:.0%} neither's"],
        ]  # fmt: skip
        accuracy = table(["decoded from", "tokens right %", "chunks right %"], rows, markdown=markdown)
        return "\n".join([accuracy, "", *[f"{name:<28}{value}" for name, value in facts], "", self.protocol.line()])

    def plot(self, out: Path) -> None:
        """Accuracy over noise, KL and spread by dimension, and the line from one chunk to another."""
        figure = new_figure(9.6, 6.2)
        (noise, kl), (spread, way) = figure.subplots(2, 2)
        for colour, curve in zip(itertools.cycle(COLOURS), self.curves, strict=False):
            noise.plot(curve.levels, [100 * i.estimate for i in curve.tokens], color=colour, label=f"in {UNITS[curve.unit]}")
            low, high = ([100 * getattr(i, end) for i in curve.tokens] for end in ("low", "high"))
            noise.fill_between(curve.levels, low, high, color=colour, alpha=0.2, lw=0)
        noise.legend(fontsize=7, frameon=False)
        tidy(noise, "tokens right under noise on the latent", "noise, standard deviation", "%")
        order = np.argsort(-self.kl)
        kl.bar(np.arange(len(order)), self.kl[order], width=1.0, color=COLOURS[0])
        tidy(kl, f"KL by dimension: {self.active} active, {self.collapsed} collapsed", "dimension, sorted", "nats")
        for colour, (name, values) in zip(
            COLOURS, {"posterior (sigma)": self.posterior_std, "aggregate": self.aggregate_std}.items(), strict=False
        ):
            spread.plot(values[order], color=colour, label=name)
        spread.set_ylim(bottom=0)
        spread.legend(fontsize=7, frameon=False)
        tidy(spread, f"standard deviations, effective rank {self.effective_rank:.1f}", "dimension, in the same order", "")
        parts = {"first chunk's": self.interpolation.start, "second chunk's": self.interpolation.end}
        for colour, (name, shares) in zip(COLOURS, (parts | {"neither's": self.interpolation.foreign}).items(), strict=False):
            way.plot(self.interpolation.places, [100 * share for share in shares], color=colour, label=name)
        way.legend(fontsize=7, frameon=False)
        tidy(way, "tokens decoded on the line between two chunks", "place on the line", "%")
        figure.savefig(out)


def _spread(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, [5, 50, 95])
    return f"{values.mean():.3f} (5 % {low:.3f}, median {middle:.3f}, 95 % {high:.3f})"


def inspect_autoencoder(
    autoencoder: Any,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    levels: Sequence[float] = LEVELS,
    special_ids: Sequence[int] = (),
    text: TextProtocol | None = None,
    name: str = "autoencoder",
) -> AutoencoderInspection:
    """Accuracy under noise in three units, the dimensions' statistics, and how smoothly latents change with text.

    Args:
        autoencoder: `calm.core.autoencoder.Autoencoder`, or a module with its `encode`, `decode` and `config`.
        levels: standard deviations of the noise; the first must be 0. special_ids: tokens that no chunk is changed to.

    Raises:
        UsageError: blocks that do not fit, or levels that do not start at 0.
    """
    text = checked(blocks, document, autoencoder.config.chunk_size, text)
    if not levels or levels[0] != 0 or min(levels) < 0:
        raise UsageError(f"levels are standard deviations that start at 0, got {list(levels)}")
    graph, params = nnx.split(autoencoder)
    moments, (total, products) = run_blocks(partial(_moments, graph, params), blocks, None)[0]
    moments = LatentMoments(*(np.asarray(part, np.float64).sum(0) for part in moments))
    aggregate, posterior = np.asarray(moments.aggregate_std), np.asarray(moments.posterior_std)
    spread = covariance(*(np.asarray(part, np.float64).sum(0) for part in (total, products)), count=float(moments.count))

    def accuracy(unit: str, scale: np.ndarray, levels: Sequence[float]) -> tuple[list[Interval], list[Interval]]:
        """Tokens and chunks right at each level of noise."""
        score = partial(_right_under_noise, graph, params, own_std=unit == "own")
        sigmas, widths = jnp.asarray(levels, jnp.float32), jnp.asarray(scale, jnp.float32)
        totals, _ = run_blocks(lambda tokens, rows: score(tokens, rows, stream(key, "noise"), sigmas, widths), blocks, None)
        sums = sums_of(totals, blocks.shape[1] // autoencoder.config.chunk_size, document, blocks.shape[1])
        return _pairs(sums)

    scales = {"latent": np.ones_like(aggregate), "posterior": posterior, "aggregate": aggregate}
    curves = [
        NoiseCurve(unit=unit, levels=list(levels), tokens=tokens, chunks=chunks)
        for unit, scale in scales.items()
        for tokens, chunks in [accuracy(unit, scale, levels)]
    ]
    sampled_tokens, sampled_chunks = accuracy("own", np.ones_like(aggregate), [1.0])
    way, near = _smoothness(autoencoder, blocks, stream(key, "neighbours"), aggregate, special_ids)
    return AutoencoderInspection(
        name=name,
        protocol=text,
        curves=curves,
        sampled_tokens=sampled_tokens[0],
        sampled_chunks=sampled_chunks[0],
        kl=np.asarray(moments.kl / moments.count),
        posterior_std=posterior,
        aggregate_std=aggregate,
        variance_of_means=np.asarray(moments.variance_of_means),
        effective_rank=effective_rank(spread),
        participation_ratio=participation_ratio(spread),
        interpolation=way,
        neighbours=near,
    )


def _pairs(sums: BlockSums) -> tuple[list[Interval], list[Interval]]:
    count = sums.total.shape[1]
    intervals = bootstrap(sums, [lambda means, i=i: means[..., i] for i in range(count)])
    return intervals[: count // 2], intervals[count // 2 :]


@partial(jax.jit, static_argnames=("graph",))
def _moments(
    graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"]
) -> tuple[LatentMoments, tuple[Float[Array, "B Z"], Float[Array, "B Z Z"]]]:
    """Sums over each block's chunks: of the dimensions' statistics, of means, and of their outer products."""
    autoencoder = nnx.merge(graph, params)
    posterior = autoencoder.encode(tokens.reshape(len(tokens), -1, autoencoder.config.chunk_size))
    ones = jnp.ones(posterior.mean.shape[1])
    moments = jax.vmap(lambda mean, std, kl: latent_moments(mean, std, kl, ones))(posterior.mean, posterior.std, posterior.kl())
    products = jnp.einsum("bnx,bny->bxy", posterior.mean, posterior.mean, precision="highest")
    return moments, (posterior.mean.sum(1), products)


@partial(jax.jit, static_argnames=("graph", "own_std"))
def _right_under_noise(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    rows: Int[Array, "B"],
    key: PRNGKey,
    sigmas: Float[Array, "L"],
    scale: Float[Array, "Z"],
    *,
    own_std: bool,
) -> Float[Array, "B F"]:
    """Tokens right (as chunks' worth) at every level, then chunks right; `own_std`: noise as each chunk's posterior has it."""
    autoencoder = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, autoencoder.config.chunk_size)
    posterior = autoencoder.encode(chunks)
    keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
    if own_std:
        noise = jax.vmap(type(posterior).sample)(posterior, keys) - posterior.mean
    else:
        noise = scale * jax.vmap(lambda key: jax.random.normal(key, posterior.mean.shape[1:]))(keys)

    def right(sigma: Float[Array, ""]) -> Float[Array, "2 B"]:
        equal = autoencoder.decode(posterior.mean + sigma * noise) == chunks
        return jnp.stack([equal.mean(-1).sum(1), equal.all(-1).sum(1).astype(jnp.float32)])

    return jnp.moveaxis(jax.lax.map(right, sigmas), 0, 1).reshape(-1, len(tokens)).T


def _smoothness(
    autoencoder: Any, blocks: np.ndarray, key: PRNGKey, aggregate: np.ndarray, special_ids: Sequence[int]
) -> tuple[Interpolation, Neighbours]:
    """On up to 4096 chunks: the line to a random other chunk, and the distance to a chunk with one token changed."""
    size, vocab_size = autoencoder.config.chunk_size, autoencoder.config.vocab_size
    chunks = jnp.asarray(blocks.reshape(-1, size)[:4096], jnp.int32)
    keys = {name: stream(key, name) for name in ("other", "place", "token", "draw")}
    others = chunks[jax.random.permutation(keys["other"], len(chunks))]
    ordinary = jnp.asarray(np.setdiff1d(np.arange(vocab_size), np.asarray(special_ids, int)), jnp.int32)
    place = jax.random.randint(keys["place"], (len(chunks), 1), 0, size)
    token = ordinary[jax.random.randint(keys["token"], (len(chunks), 1), 0, len(ordinary))]
    changed = jnp.where(jnp.arange(size) == place, token, chunks)
    graph, params = nnx.split(autoencoder)
    scale = jnp.asarray(np.maximum(aggregate, 1e-6), jnp.float32)

    @jax.jit
    def measure(params: Any) -> tuple[Array, Array]:
        model = nnx.merge(graph, params)
        here, there, near = (model.encode(each) for each in (chunks, others, changed))
        draw = here.sample(keys["draw"]) - here.mean

        def root_mean_square(difference: Array, counts: Array) -> Array:
            squares = jnp.square(difference / scale).mean(-1)
            return jnp.sqrt((squares * counts).sum() / jnp.maximum(counts.sum(), 1))

        differ, moved = (chunks != others).any(-1), (chunks != changed).any(-1)
        distances = jnp.stack(
            [
                root_mean_square(draw, jnp.ones(len(chunks))),
                root_mean_square(near.mean - here.mean, moved),
                root_mean_square(there.mean - here.mean, differ),
            ]
        )

        def shares(place: Array) -> Array:
            found = model.decode(here.mean + place * (there.mean - here.mean))
            different = chunks != others  # tokens that both share are left out
            count = jnp.maximum(different.sum(), 1)
            return jnp.stack([((found == end) & different).sum() / count for end in (chunks, others)])

        return jax.lax.map(shares, jnp.asarray(PLACES, jnp.float32)), distances

    shares, distances = map(np.asarray, measure(params))
    way = Interpolation(places=list(PLACES), start=shares[:, 0].tolist(), end=shares[:, 1].tolist())
    draw, one, every = map(float, distances)
    return way, Neighbours(posterior_draw=draw, one_token=one, all_tokens=every)


def effective_rank(covariance: Float[np.ndarray, "Z Z"]) -> float:
    """exp of the entropy of the eigenvalues' shares: Z for a round cloud, 1 for a line (Roy and Vetterli 2007).

    The rank counts directions however little they vary; this one weighs them.
    """
    values = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    shares = values / max(values.sum(), 1e-300)
    return float(np.exp(-np.sum(shares * np.log(np.maximum(shares, 1e-300)))))


def participation_ratio(covariance: Float[np.ndarray, "Z Z"]) -> float:
    """(sum of eigenvalues)^2 / sum of their squares: as the effective rank, with less weight on small directions."""
    return float(np.trace(covariance) ** 2 / max(float(np.sum(covariance**2)), 1e-300))


def covariance(
    total: Float[np.ndarray, "Z"], products: Float[np.ndarray, "Z Z"], count: float | int
) -> Float[np.ndarray, "Z Z"]:
    """From sums over samples of x and of x x^T."""
    mean = total / count
    return products / count - np.outer(mean, mean)
