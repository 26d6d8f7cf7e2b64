"""Bounding the likelihood of next-vector models on blocks of held-out text, at the positions where BrierLM scores them.

The arithmetic is `calm.evaluate.nll_bound`; here is what a model has to do for it. Per position S latents are decoded and only
the target tokens' log-probabilities kept, [S *b K] floats: logits exist for some hundred rows at a time, latents for a few
samples.
"""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import TextProtocol
from calm.core.predictor import Predictor
from calm.decoders.context_decoder import recent_tokens
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.likelihood_report import LikelihoodReport
from calm.evaluate.ngram import Unigram
from calm.evaluate.nll_bound import SHARES, bound_curve, sample_sizes, smoothed
from calm.rng import PRNGKey, stream

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
            latents = jax.vmap(lambda law, key: law.draws(key, at_once), out_axes=1)(posterior, of_group)
            weight = predictor.lm.head.log_density(hidden, latents) - posterior.log_prob(latents).sum(-1)
        return predictor.token_log_probs(hidden, previous, latents, targets), weight

    log_probs, weight = jax.lax.map(group, jnp.arange(-(-num_samples // at_once)))
    log_probs = log_probs.reshape(-1, *log_probs.shape[2:])[:num_samples]
    weight = weight.reshape(-1, *weight.shape[2:])[:num_samples]

    def curve(share: Float[Array, ""]) -> Float[Array, "B X"]:
        return -bound_curve(smoothed(log_probs, unigram[targets], share).sum(-1) + weight, sizes).sum(1)

    return jnp.moveaxis(jax.lax.map(curve, shares), 0, 1).reshape(len(tokens), -1)


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

    The smoothing share is chosen from `calm.evaluate.nll_bound.SHARES` as the one with the best bound on `calibration`, which
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
    graph, params = nnx.split(predictor)
    log_unigram = jnp.log(jnp.asarray(unigram.probability, jnp.float32))
    size = batch_size or max(1, FLOATS_AT_ONCE // (num_samples * blocks.shape[1]))
    score = partial(_bound_sums, graph, params, num_samples=num_samples)

    def run(
        rows: np.ndarray, shares: tuple[float, ...], sizes: tuple[int, ...], from_encoder: bool
    ) -> tuple[np.ndarray, float]:
        options = dict(sizes=sizes, from_encoder=from_encoder)
        values = jnp.asarray(shares, jnp.float32)
        return run_blocks(
            lambda tokens, number: score(tokens, number, key, log_unigram, values, **options), rows, min(size, len(rows))
        )

    chosen = SHARES[int(np.argmin(run(calibration, SHARES, (num_samples,), False)[0].sum(0)))]
    nats, rate = run(blocks, (chosen,), sizes, False)
    proposes = hasattr(predictor.lm.head, "log_density") and _fills_space(predictor)
    encoder = run(blocks, (chosen,), sizes, True)[0] if proposes else None
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
