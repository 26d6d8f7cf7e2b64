"""BrierLM of any predictor: sample the next tokens at every boundary, let each sample read what it wrote where a chunk is
shorter than four tokens, and score.

One pass of the backbone reads the text; the S samples of every boundary then go on as branches that share its keys
(`calm.nn.Backbone.fork`). Three ways, by what the model knows of itself: a model that has probabilities of tokens is scored
through them; a latent that is drawn through the decoder's softmax by exact inner products; all else by counting equal samples.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.brier_lm import ORDERS, Before, Decoding, TextProtocol, brier_argmax, brier_drawn_from_latents, brier_known
from calm.core.brier_lm import Protocol as BrierProtocol
from calm.core.energy_score import energy_loss
from calm.core.predictor import NextVector, Predictor
from calm.decoders.context_decoder import recent_tokens
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.boundaries import Phase, phases_of, targets_at
from calm.evaluate.scores import BrierReport
from calm.rng import PRNGKey, stream
from calm.token.softmax_head import by_row_blocks, draw_places


@runtime_checkable
class KnownProbabilities(Predictor, Protocol):
    """A predictor of one token at a time that can say the probability of every token."""

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]: ...


class Places(NamedTuple):
    """One phase of a batch of blocks."""

    chunks: Int[Array, "B N K"]
    targets: Int[Array, "B A O"]
    ends: Int[Array, "A"]
    weight: Float[Array, "A"]
    next_chunks: Int[Array, "B A K"] | None
    """for the energy loss; none where it is not asked for"""


def evaluate_predictor(
    predictor: Predictor,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    num_samples: int = 8,
    decoding: Decoding = "argmax",
    boundary_every: int = 4,
    begin_id: int | None = None,
    batch_size: int | None = None,
    with_energy: bool = True,
    text: TextProtocol | None = None,
    name: str = "model",
) -> BrierReport:
    """Brier-1..4 and BrierLM; the energy loss of a next-vector model; nats per token of a model with probabilities.

    Args:
        blocks, document: token blocks and the document that each begins in.
        num_samples: S continuations of every boundary, at least 2. The energy loss uses the same latents.
        decoding: tokens of a latent are the decoder's "argmax", or "drawn" from its softmax. A model with probabilities is
            drawn from them.
        boundary_every: a boundary every how many tokens; 1 for all phases of the chunks (`calm.evaluate.boundaries`).
        begin_id: what fills the first chunk of a phase that is not 0; needed where K does not divide `boundary_every`.
        batch_size: blocks at a time; by default about 2048 tokens on CPU and 32768 elsewhere. It does not change the scores.
        with_energy: the energy loss, over the boundaries of phase 0. text: what to stamp on the scores.

    Raises:
        UsageError: blocks that do not fit the chunk size, the boundaries or the protocol, fewer than 2 samples, an unknown
            decoding, a missing begin_id.
    """
    chunk_size, block_tokens = predictor.chunk_size, blocks.shape[1]
    text = checked(blocks, document, chunk_size, text)
    if decoding not in ("argmax", "drawn"):
        raise UsageError(f"decoding must be argmax or drawn, got {decoding!r}")
    known = isinstance(predictor, KnownProbabilities)
    protocol = BrierProtocol(
        **text.to_dict(),
        num_samples=num_samples,
        decoding="drawn" if known else decoding,
        boundary_every=boundary_every,
    )
    phases = phases_of(block_tokens, chunk_size, boundary_every)
    if begin_id is None and any(phase.begins for phase in phases):
        raise UsageError(f"begin_id is needed: chunks of {chunk_size} tokens meet a boundary every {boundary_every} in phases")
    reads_latents = isinstance(predictor, NextVector) and predictor.lm.context_decoder is None
    with_energy = with_energy and reads_latents and not phases[0].begins
    graph, params = nnx.split(predictor)

    def places(tokens: np.ndarray, phase: Phase) -> Places:
        next_chunks = phase.next_chunks(tokens) if with_energy and not phase.begins else None
        chunks = tokens[..., None] if known else phase.chunks(tokens, begin_id or 0)
        return Places(
            *jax.tree.map(jnp.asarray, (chunks, targets_at(tokens, phase.places), phase.ends, phase.weight, next_chunks))
        )

    def score(tokens: np.ndarray, rows: np.ndarray) -> tuple[Array, Array]:
        parts = []
        for phase in phases:
            # One key a block, by its number in the split: a score does not depend on the batch size.
            keys = jax.vmap(partial(jax.random.fold_in, stream(key, "samples", phase.number)))(rows)
            where = places(tokens, phase)
            parts.append(_score(graph, params, where, keys, key, num_samples=num_samples, decoding=decoding, known=known))
        return jax.tree.map(lambda *values: sum(values[1:], start=values[0]), *parts)

    (scores, beside), rate = run_blocks(score, blocks, batch_size)
    count = sum(int(phase.weight.sum()) for phase in phases)
    energy = sums_of(beside, int(phases[0].weight.sum()), document, block_tokens) if with_energy else None
    nats = sums_of(beside, block_tokens - int(phases[0].places[0]), document, block_tokens) if known else None
    return BrierReport(
        name=name,
        protocol=protocol,
        scores=sums_of(scores, count, document, block_tokens),
        energy=energy,
        likelihood=nats,
        tokens_per_second=rate,
    )


@partial(jax.jit, static_argnames=("graph", "num_samples", "decoding", "known"))
def _score(
    graph: Any,
    params: Any,
    where: Places,
    keys: Array,
    key: PRNGKey,
    *,
    num_samples: int,
    decoding: Decoding,
    known: bool,
) -> tuple[Float[Array, "B O"], Float[Array, "B 1"]]:
    """Sums over the boundaries of each block: Brier-n; and energy, nats or nothing."""
    predictor: Any = nnx.merge(graph, params)
    if known:
        scores, beside = _by_probabilities(predictor, where, keys, num_samples)
    else:
        scores, beside = _by_samples(predictor, where, keys, key, num_samples, decoding)
    return (scores * where.weight[:, None]).sum(1), beside


def _by_samples(
    predictor: Any, where: Places, keys: Array, key: PRNGKey, num_samples: int, decoding: Decoding
) -> tuple[Float[Array, "B A O"], Float[Array, "B 1"]]:
    batch, length, chunk_size = where.chunks.shape
    later = -(-ORDERS // chunk_size) - 1  # chunks after the first that it takes to have four tokens
    state = predictor.init_state(batch, length, rewindable=True) if later else None
    hidden, state = predictor.hidden(where.chunks, state)
    at = where.ends - 1
    hidden, previous = hidden[:, at], recent_tokens(where.chunks, predictor.reach)[:, at]
    lead = (batch, len(at), num_samples)
    has_latent = isinstance(predictor, NextVector) and predictor.lm.context_decoder is None
    by_products = has_latent and decoding == "drawn"

    def samples_first(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(*lead, *x.shape[2:]), 2, 0)

    def draw(step: int, shape: tuple[int, ...]) -> Any:
        step_keys = keys if step == 0 else jax.vmap(lambda key: stream(key, "later", step))(keys)
        return jax.vmap(lambda key: predictor.draw_noise(key, shape, decoding), out_axes=1)(step_keys)

    noise = draw(0, (num_samples, len(at)))
    energy, latents = jnp.zeros((batch, 1)), None
    if has_latent:
        latents = predictor.lm.head(hidden, noise.latent)
        if where.next_chunks is not None:
            posterior = predictor.autoencoder.encode(where.next_chunks)
            energy = (energy_loss(latents, posterior, stream(key, "draws")) * where.weight).sum(1, keepdims=True)

    parts, written = [], jnp.zeros((num_samples, batch, len(at), 0), jnp.int32)
    for step in range(later + 1):
        if step:
            last = jnp.moveaxis(written[..., -chunk_size:], 0, 2).reshape(batch, -1, chunk_size)
            state = predictor.fork(state, where.ends, num_samples, later) if step == 1 else state
            hidden, state = predictor.hidden(last, state)
            previous = previous if step > 1 else jnp.repeat(previous, num_samples, axis=1)  # as the branches stand
            previous = jnp.concatenate([previous, last], axis=-1)[..., chunk_size:]
            noise = draw(step, (1, hidden.shape[1]))
            latents = samples_first(predictor.lm.head(hidden, noise.latent)[0]) if by_products else None
        if by_products:
            assert latents is not None
            known = written.shape[-1]
            until = min(known + chunk_size, ORDERS)
            before = Before(written, where.targets[..., :known])
            logits_of = _first_logits(predictor.autoencoder, until - known)
            parts.append(brier_drawn_from_latents(logits_of, latents, where.targets[..., known:until], before))
        if step < later or not by_products:
            tokens = predictor.write(hidden, previous, noise, decoding=decoding)
            written = jnp.concatenate([written, samples_first(tokens[0]) if step else tokens], axis=-1)
    scores = jnp.concatenate(parts, axis=-1) if by_products else brier_argmax(written[..., :ORDERS], where.targets)
    return scores, energy


def _first_logits(autoencoder: Any, tokens: int) -> Any:
    """Latents to the logits of the first few tokens of their chunk."""
    return lambda latents: autoencoder.logits(latents)[..., :tokens, :]


def _by_probabilities(
    predictor: Any, where: Places, keys: Array, num_samples: int
) -> tuple[Float[Array, "B A O"], Float[Array, "B 1"]]:
    """The text's own tokens by their probabilities, the self-match along continuations drawn from the squared law."""
    batch, length, _ = where.chunks.shape
    count = len(where.ends)
    hidden, state = predictor.hidden(where.chunks, predictor.init_state(batch, length, rewindable=True))

    def log_prob(hidden: Array, tokens: Array) -> Array:
        logits = predictor.logits(hidden)
        return jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)

    def match_and_draw(hidden: Array, uniforms: Array) -> tuple[Array, Array]:
        """sum p^2 of each row, and tokens drawn from p^2 / sum p^2."""
        logits = predictor.logits(hidden)
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        squares = weights**2
        return squares.sum(-1) / weights.sum(-1) ** 2, draw_places(uniforms, squares)

    def rows(x: Array) -> Array:
        return x.reshape(-1, x.shape[-1])

    after = where.chunks[:, 1:, 0]
    log_probs = by_row_blocks(log_prob, rows(hidden[:, :-1]), after.reshape(-1)).reshape(batch, length - 1)
    at = where.ends - 1
    first = jnp.arange(length - 1) >= at[0]
    nats = -(log_probs * first).sum(1, keepdims=True)

    # From the boundary S continuations part, each of which goes on alone.
    here, branches, matches = hidden[:, at], 1, []
    for order in range(ORDERS):
        draws = num_samples // branches
        of_order = jax.vmap(lambda key, order=order: stream(key, "squared", order))(keys)
        uniforms = jax.vmap(lambda key: jax.random.uniform(key, (count * num_samples, 2)))(of_order)
        match, tokens = by_row_blocks(match_and_draw, rows(here), uniforms.reshape(batch * count * branches, draws, 2))
        matches.append(jnp.broadcast_to(match.reshape(batch, count, branches), (batch, count, num_samples)))
        if order + 1 < ORDERS:
            state = predictor.fork(state, where.ends, num_samples, ORDERS - 1) if order == 0 else state
            here, state = predictor.hidden(tokens.reshape(batch, count * num_samples, 1), state)
            branches = num_samples
    self_match = jnp.moveaxis(jnp.stack(matches, axis=-1), 2, 0)
    return brier_known(log_probs[:, at[:, None] + jnp.arange(ORDERS)], self_match), nats
