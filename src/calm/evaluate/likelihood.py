"""An upper bound on the negative log-likelihood of next-vector models, on blocks of held-out text.

The probability of a chunk x is an expectation over latents, p(x) = E_z p(x | z), which has no closed form. The mean over S
draws is an unbiased estimate of it, and the logarithm is concave, so

    log (1/S) sum_s p(x | z_s),   z_s ~ p(z)

lies below log p(x) in expectation, the less the larger S is. A better proposal q(z | x), such as the autoencoder's encoder,
gives

    log (1/S) sum_s p(z_s) p(x | z_s) / q(z_s | x),   z_s ~ q(z | x)

which bounds the same number, but needs the density p(z).

A decoder that was never trained to be uncertain gives a wrong token a probability near 0, and one such token makes a bound
worthless. So the decoder is smoothed: each token has (1 - e) p_decoder + e p_unigram. That is a model of its own, which draws a
token from the unigram with probability e; the bound is about it, and e is part of the score.

Per position S latents are decoded and only the target tokens' log-probabilities kept, [S *b K] floats: logits exist for some
hundred rows at a time, latents for a few samples.

Source: the bound and that it tightens with S are of Burda et al. 2016, arXiv:1509.00519. CALM (arXiv:2510.27688) gives no
likelihood at all; the smoothing is ours.
"""

import dataclasses
import math
from functools import cached_property, partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import TextProtocol
from calm.core.chunk_decoder import recent_tokens
from calm.core.intervals import BlockSums, Interval, bootstrap
from calm.core.predictor import Predictor
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.ngram import Unigram
from calm.evaluate.tables import interval_text, table
from calm.rng import PRNGKey, stream

# Shares of the unigram that are tried: evenly spaced in log(e / (1 - e)), from .0001 to .98.
SHARES = tuple(float(share) for share in 1 / (1 + np.exp(-np.linspace(np.log(1e-4), np.log(49.0), 32))))


def smoothed(
    log_probs: Float[Array, "S *b K"], unigram: Float[Array, "*b K"], share: float | Float[Array, ""]
) -> Float[Array, "S *b K"]:
    """log((1 - share) p + share u) for each token: `log_probs` and `unigram` are the logarithms of p and u, in nats."""
    return jnp.logaddexp(jnp.log1p(-share) + log_probs, jnp.log(share) + unigram)


def log_mean_exp(values: Float[Array, "S *b"]) -> Float[Array, "*b"]:
    """log of the mean of exp over the first axis, without overflow."""
    return jax.nn.logsumexp(values, axis=0) - jnp.log(values.shape[0])


def sample_sizes(num_samples: int) -> tuple[int, ...]:
    """The numbers of samples at which a bound is reported: the powers of two up to `num_samples`, and itself."""
    if num_samples < 1:
        raise UsageError(f"a likelihood bound needs at least 1 sample, got {num_samples}")
    return (*(2**i for i in range(num_samples.bit_length()) if 2**i < num_samples), num_samples)


def bound_curve(chunk_log_probs: Float[Array, "S *b"], sizes: tuple[int, ...]) -> Float[Array, "*b X"]:
    """The bound for each number of samples in `sizes`, in nats: entry i estimates E log mean of sizes[i] samples.

    For a number s the S samples are S // s groups of s, and the groups' bounds are averaged: the same samples serve every
    size, and small sizes are as well measured as large ones.
    """

    def of_size(size: int) -> Float[Array, "*b"]:
        groups = chunk_log_probs.shape[0] // size
        grouped = chunk_log_probs[: groups * size].reshape(groups, size, *chunk_log_probs.shape[1:])
        return log_mean_exp(jnp.moveaxis(grouped, 1, 0)).mean(0)

    return jnp.stack([of_size(size) for size in sizes], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LikelihoodReport:
    """Upper bounds on the nats per token by number of samples of the latent; the decoder is smoothed.

    Attributes:
        sizes: numbers of samples S, ascending. nats: one column for each, negative bound per token, for each block.
        encoder: the same where latents were proposed by the encoder; None for a head without a density.
        share: of the unigram in every token's probability. fitted_on: the text on which it was chosen.
        unigram: negative log-likelihood per token of the unigram model alone.
        num_bytes: bytes of text in the scored tokens.
    """

    name: str
    protocol: TextProtocol
    sizes: tuple[int, ...]
    nats: BlockSums
    encoder: BlockSums | None
    share: float
    fitted_on: str
    unigram: BlockSums
    vocab_size: int
    num_bytes: int
    tokens_per_second: float | None = None

    @cached_property
    def rows(self) -> list[tuple[str, Interval]]:
        """Label, and nats per token with its interval, of each bound; the tightest last."""
        rows = list(zip([f"{self.name} <= (S={size})" for size in self.sizes], _intervals(self.nats), strict=True))
        if self.encoder is not None:
            rows.append((f"{self.name} <= (S={self.sizes[-1]}, from the encoder)", _intervals(self.encoder)[-1]))
        return rows

    @property
    def nats_per_token(self) -> Interval:
        """The tightest bound that was computed with the model's own samples."""
        return self.rows[len(self.sizes) - 1][1]

    @cached_property
    def unigram_nats(self) -> Interval:
        return _intervals(self.unigram)[0]

    def bits_per_byte(self, nats: float) -> float:
        """Nats per token as bits per byte of the scored text."""
        return nats * float(self.nats.count.sum()) / (self.num_bytes * math.log(2)) if self.num_bytes else math.nan

    def scalars(self) -> dict[str, float]:
        """The estimates alone: for a training log, or a table of another report."""
        nats = float(self.nats.means[-1])
        values = {"nats_per_token_bound": nats, "bits_per_byte_bound": self.bits_per_byte(nats), "smoothing_share": self.share}
        if self.encoder is not None:
            values["nats_per_token_bound_encoder"] = float(self.encoder.means[-1])
        return values

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "protocol": {**self.protocol.to_dict(), "samples": self.sizes[-1], "smoothing_share": self.share},
            "smoothing_fitted_on": self.fitted_on,
            "bounds": {label: interval.to_dict() | self._derived(interval) for label, interval in self.rows},
            "unigram": self.unigram_nats.to_dict() | self._derived(self.unigram_nats),
            "uniform": self._derived(math.log(self.vocab_size)),
            "scored_tokens": int(self.nats.count.sum()),
            "scored_bytes": self.num_bytes,
            "tokens_per_second": self.tokens_per_second,
        }

    def _derived(self, nats: Interval | float) -> dict[str, float]:
        value = nats.estimate if isinstance(nats, Interval) else nats
        return {"nats_per_token": value, "bits_per_byte": self.bits_per_byte(value), "perplexity": math.exp(min(value, 700.0))}

    def table(self, *, markdown: bool = False) -> str:
        header = ["likelihood", "nats per token", "bits per byte", "perplexity"]
        known = [("unigram", self.unigram_nats), ("uniform", _exactly(math.log(self.vocab_size)))]
        rows = [
            [label, interval_text(nats, 3), *[f"{self._derived(nats)[name]:.5g}" for name in ("bits_per_byte", "perplexity")]]
            for label, nats in [*self.rows, *known]
        ]
        below = [
            self.protocol.line(),
            f"<= is a bound: the model is at least as good in expectation; decoder smoothed by {100 * self.share:.2g} % of the "
            f"unigram, fitted on {self.fitted_on}; {int(self.nats.count.sum())} tokens scored",
        ]
        return "\n".join([table(header, rows, markdown=markdown), "", *below])


def _intervals(sums: BlockSums) -> list[Interval]:
    return bootstrap(sums, [lambda means, i=i: means[..., i] for i in range(sums.total.shape[1])])


def _exactly(value: float) -> Interval:
    return Interval(estimate=value, low=math.nan, high=math.nan)


SAMPLES_AT_ONCE = 8
FLOATS_AT_ONCE = 2**22  # of target log-probabilities: 16 MB


@runtime_checkable
class LatentPredictor(Predictor, Protocol):
    """A predictor that makes its noise a latent first, and knows the probability of tokens given a latent."""

    @property
    def lm(self) -> Any:
        """Its `head(hidden, noise)` gives latents; a head with `log_density` also takes the encoder's proposal."""
        ...

    @property
    def autoencoder(self) -> Any:
        """Its `encode(chunks)` proposes latents."""
        ...

    def token_log_probs(
        self,
        hidden: Float[Array, "*b D"],
        previous: Int[Array, "*b w"],
        latents: Float[Array, "S *b Z"],
        targets: Int[Array, "*b K"],
    ) -> Float[Array, "S *b K"]: ...


@partial(jax.jit, static_argnames=("graph", "num_samples", "sizes", "from_encoder"))
def _bound_sums(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    rows: Int[Array, "B"],
    key: PRNGKey,
    unigram: Float[Array, "V"],
    shares: Float[Array, "G"],
    *,
    num_samples: int,
    sizes: tuple[int, ...],
    from_encoder: bool,
) -> Float[Array, "B X"]:
    """Negative bounds in nats summed over a block's positions: for each share, for each number of samples."""
    predictor: Any = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, predictor.chunk_size)
    targets = chunks[:, 1:]
    hidden, _ = predictor.hidden(chunks[:, :-1])
    previous = recent_tokens(chunks[:, :-1], predictor.reach)
    at_once = min(num_samples, SAMPLES_AT_ONCE)
    posterior = predictor.autoencoder.encode(targets) if from_encoder else None
    keys = jax.vmap(partial(jax.random.fold_in, stream(key, "bound")))(rows)  # a block's samples do not depend on its batch

    def group(number: Int[Array, ""]) -> tuple[Float[Array, "S B N K"], Float[Array, "S B N"]]:
        """Some of the samples: log-probabilities of the target's tokens, and of the sample under the head over the proposal."""
        of_group = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
        shape = (at_once, targets.shape[1])
        if posterior is None:
            noise = jax.vmap(lambda key: predictor.draw_noise(key, shape).latent, out_axes=1)(of_group)
            latents = predictor.lm.head(hidden, noise)
            weight = jnp.zeros(latents.shape[:-1])
        else:
            latents = jax.vmap(lambda posterior, key: posterior.draws(key, at_once), out_axes=1)(posterior, of_group)
            weight = predictor.lm.head.log_density(hidden, latents) - posterior.log_prob(latents).sum(-1)
        return predictor.token_log_probs(hidden, previous, latents, targets), weight

    log_probs, weight = jax.lax.map(group, jnp.arange(-(-num_samples // at_once)))
    log_probs = log_probs.reshape(-1, *log_probs.shape[2:])[:num_samples]
    weight = weight.reshape(-1, *weight.shape[2:])[:num_samples]

    def curve(share: Float[Array, ""]) -> Float[Array, "B X"]:
        return -bound_curve(smoothed(log_probs, unigram[targets], share).sum(-1) + weight, sizes).sum(1)

    return jnp.moveaxis(jax.lax.map(curve, shares), 0, 1).reshape(len(tokens), -1)


def _run(
    predictor: LatentPredictor,
    blocks: Int[np.ndarray, "R T"],
    key: PRNGKey,
    *,
    unigram: Unigram,
    shares: tuple[float, ...],
    sizes: tuple[int, ...],
    num_samples: int,
    from_encoder: bool = False,
    batch_size: int | None = None,
) -> tuple[np.ndarray, float]:
    """`_bound_sums` of every block [R X], and tokens per second."""
    graph, params = nnx.split(predictor)
    log_unigram = jnp.log(jnp.asarray(unigram.probability, jnp.float32))
    size = batch_size or max(1, FLOATS_AT_ONCE // (num_samples * blocks.shape[1]))
    score = partial(_bound_sums, graph, params, num_samples=num_samples, sizes=sizes, from_encoder=from_encoder)
    values = jnp.asarray(shares, jnp.float32)
    return run_blocks(lambda tokens, rows: score(tokens, rows, key, log_unigram, values), blocks, min(size, len(blocks)))


def fit_share(
    predictor: LatentPredictor,
    calibration: Int[np.ndarray, "Q T"],
    key: PRNGKey,
    *,
    unigram: Unigram,
    num_samples: int,
    batch_size: int | None = None,
) -> float:
    """The unigram's share, one of SHARES, with the lowest bound by `num_samples` latents on blocks `calibration`."""
    options: dict[str, Any] = dict(unigram=unigram, num_samples=num_samples, batch_size=batch_size)
    nats, _ = _run(predictor, calibration, key, shares=SHARES, sizes=(num_samples,), **options)
    return SHARES[int(np.argmin(nats.sum(0)))]


def _fills_space(predictor: LatentPredictor) -> bool:
    """Whether the encoder's posterior has a density over all latents."""
    chunk = jax.ShapeDtypeStruct((1, predictor.chunk_size), jnp.int32)
    return nnx.eval_shape(lambda model, chunk: model.encode(chunk), predictor.autoencoder, chunk).fills_space


def evaluate_likelihood(
    predictor: LatentPredictor,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    unigram: Unigram,
    calibration: Int[np.ndarray, "Q T"],
    fitted_on: str,
    num_bytes: int,
    num_samples: int = 64,
    batch_size: int | None = None,
    text: TextProtocol | None = None,
    name: str = "latent LM",
) -> LikelihoodReport:
    """An upper bound on the negative log-likelihood of a next-vector model, in nats per token; lower as S grows.

    The smoothing share is chosen from `SHARES` as the one with the best bound on `calibration`, which
    must not be scored: then the bound holds for a model that was fixed before its text was seen. A head with `log_density` is
    bounded a second time with latents from the encoder, unless its posterior lies on a surface: densities there and in all of
    the space cannot be divided by one another.

    Args:
        blocks, document: token blocks to score and the document that each begins in; a block's first chunk is only context.
        unigram: fitted on the training text. calibration, fitted_on: blocks for the share, and what to stamp about them.
        num_bytes: bytes of text in the scored tokens. num_samples: S latents at each position.

    Raises:
        UsageError: no samples, a unigram of another vocabulary, calibration text that is also scored, blocks that do not fit.
    """
    text = checked(blocks, document, predictor.chunk_size, text)
    sizes = sample_sizes(num_samples)
    if unigram.vocab_size != predictor.vocab_size:
        raise UsageError(f"the unigram has a vocabulary of {unigram.vocab_size}, the model one of {predictor.vocab_size}")
    if not len(calibration) or calibration.shape[1:] != blocks.shape[1:]:
        raise UsageError(f"calibration needs at least one block of {blocks.shape[1]} tokens, got {list(calibration.shape)}")
    if {row.tobytes() for row in np.asarray(calibration, np.int32)} & {row.tobytes() for row in np.asarray(blocks, np.int32)}:
        raise UsageError("calibration: a block that is scored cannot also choose the smoothing; hold some blocks back for it")
    options: dict[str, Any] = dict(unigram=unigram, num_samples=num_samples, batch_size=batch_size)
    chosen = fit_share(predictor, calibration, key, **options)
    nats, rate = _run(predictor, blocks, key, shares=(chosen,), sizes=sizes, **options)
    proposes = hasattr(predictor.lm.head, "log_density") and _fills_space(predictor)
    encoder = None
    if proposes:
        encoder, _ = _run(predictor, blocks, key, shares=(chosen,), sizes=sizes, from_encoder=True, **options)
    scored, block_tokens = blocks.shape[1] - predictor.chunk_size, blocks.shape[1]
    alone = -np.log(unigram.probability)[blocks[:, predictor.chunk_size :]].sum(1)
    return LikelihoodReport(
        name=name,
        protocol=text,
        sizes=sizes,
        nats=sums_of(nats, scored, document, block_tokens),
        encoder=None if encoder is None else sums_of(encoder, scored, document, block_tokens),
        share=chosen,
        fitted_on=fitted_on,
        unigram=sums_of(alone, scored, document, block_tokens),
        vocab_size=predictor.vocab_size,
        num_bytes=num_bytes,
        tokens_per_second=rate,
    )
