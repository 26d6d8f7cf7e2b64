"""Compiled loop of drafting: a next-vector model proposes tokens, a token model reads them in one pass and decides.

In one pass CALM reads a chunk if one has been completed and draws latents; the open positions of the chunk are drafted one
by one; the token model reads its last token and the drafts as one block; a rule keeps a prefix of them and adds one token
of the token model. Rows are processed one by one inside one compiled program (docs/drafting.md).
"""

import dataclasses
import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from calm.core.dense import operand, product
from calm.core.mixer import Window
from calm.core.predictor import NextVector
from calm.core.steps import Model, Weights, step_keys
from calm.core.transformer import BackboneState
from calm.core.unrolled import unstack
from calm.core.vocabulary import draw_places
from calm.decoders.recall import Memory
from calm.errors import UsageError
from calm.rng import PRNGKey, stream
from calm.text.chunking import NOTHING
from calm.token.model import TokenLM
from calm.token.sampler import SoftmaxSampler

RULES, BOUNDARIES = ("accept", "match"), ("kept", "moved")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting:
    """How tokens are proposed, and which are kept."""

    rule: str = "accept"
    """accept: a draft from q is kept with probability min(1, p/q), else replaced by a token from (p - q)+ (Leviathan et al.
    2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318); match: drafts that equal the token model's own draw are kept"""
    num_latents: int = 1
    """S latents of a chunk; q is the mixture of the decoder's distributions given each"""
    boundaries: str = "kept"
    """where CALM continues after a partly kept draft: kept, in the same chunk, some tokens of which are known now; moved, at
    a chunk that begins with the next token, with K states whose boundaries are a token apart"""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UsageError(f"drafting: rule must be accept or match, got {self.rule!r}")
        if self.boundaries not in BOUNDARIES:
            raise UsageError(f"drafting: boundaries must be kept or moved, got {self.boundaries!r}")
        if self.num_latents < 1:
            raise UsageError(f"drafting: num_latents must be at least 1, got {self.num_latents}")


class Counts(NamedTuple):
    """Work done for a row."""

    passes: Int[Array, ""]
    """of the token model, each over K + 1 positions"""
    proposed: Int[Array, ""]
    """tokens that CALM drafted"""
    accepted: Int[Array, ""]
    """drafted tokens that were kept"""
    chunks: Int[Array, ""]
    """chunks that CALM read, without those of the prompt"""
    plans: Int[Array, ""]
    """times at which S latents were drawn"""
    places: Int[Array, ""]
    """positions at which the decoder was evaluated, for all S latents"""


class Uniforms(NamedTuple):
    """Random numbers of every position of the continuation, fixed by its index alone: a position that a pass leaves
    undecided is decided by a later pass with numbers that no earlier decision depends on."""

    choice: Float[Array, "T 2"]
    """with which the token model alone would draw (`calm.token.sampler.SoftmaxSampler`)"""
    draft: Float[Array, "T 2"]
    accept: Float[Array, "T"]


class Layout(NamedTuple):
    """Sizes of a row's text, which is right-aligned: begin ids, the prompt, then from `start` on the continuation."""

    start: int
    prompt_chunks: int
    """most chunks of a prompt, padding included"""
    capacity: int
    """most tokens of a continuation, including those that the last pass writes beyond the limit"""


class Plan(NamedTuple):
    """Static part of a drafting program."""

    drafting: Drafting
    sampler: SoftmaxSampler
    """of the token model; drafts are filtered in the same way"""
    layout: Layout


class Models(NamedTuple):
    """Both models, with layers stacked for reading prompts and taken apart for generation."""

    target: Model
    proposer: Model
    target_weights: Weights
    proposer_weights: Weights
    mask: Float[Array, "V"]
    """added to logits: minus infinity for banned tokens"""


class Prompts(NamedTuple):
    """Prompts of B rows."""

    keys: Array
    texts: Int[Array, "B T"]
    lengths: Int[Array, "B"]


class Proposer(NamedTuple):
    """State of CALM."""

    layers: Any
    """states of its layers, one row for each phase P of the chunk boundaries"""
    offset: Int[Array, "P"]
    starts: Int[Array, "P"]
    read: Int[Array, "P"]
    """position up to which each phase has read the text"""
    parts: Float[Array, "X *d"]
    """for each latent the decoder's states of the chunk, or the context decoder's plan of it"""
    log_weights: Float[Array, "X"]
    """of the latents, given the tokens of the chunk before `place`"""
    place: Int[Array, ""]


class Draft(NamedTuple):
    """A proposal."""

    text: Int[Array, "T"]
    """with the drafts after its end"""
    probs: Float[Array, "K V"] | None
    """distribution of each draft given the latents and the tokens before it; None where the rule does not need it"""
    history: Float[Array, "K X"]
    """log weights of the latents before each position of the chunk"""
    places: Int[Array, ""]


class Row(NamedTuple):
    """State of a row between passes."""

    target: BackboneState
    """of the token model, which has read all tokens but the last"""
    proposer: Proposer
    text: Int[Array, "T"]
    written: Int[Array, ""]
    ended: Bool[Array, ""]
    length: Int[Array, ""]
    """tokens before the end token"""
    counts: Counts


def draw_uniforms(key: PRNGKey, count: int) -> Uniforms:
    """Numbers for `count` positions; `choice` are those with which `calm.core.generate` draws from a token model."""

    def at(step: Int[Array, ""]) -> tuple[Array, Array]:
        choice = jax.random.uniform(step_keys(key[None], step).choice[0], (1, 2))[0]
        own = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(b"drafting")), step)
        return choice, jax.random.uniform(own, (3,))

    choice, own = jax.vmap(at)(jnp.arange(count))
    return Uniforms(choice, own[:, :2], own[:, 2])


# -- text of a row ----------------------------------------------------------------------------------------------------


def tokens_before(text: Int[Array, "T"], at: Int[Array, ""], number: int, first: Int[Array, ""]) -> Int[Array, "X"]:
    """The last `number` tokens before position `at`; `NOTHING` before `first`."""
    index = at - number + jnp.arange(number)
    return jnp.where(index < first, NOTHING, text[index])


def begins_before(prompt: Int[Array, ""], num_tokens: Int[Array, ""], chunk_size: int) -> Int[Array, ""]:
    """Number of begin ids before `num_tokens` tokens that fill up the first chunk, a whole chunk for an empty `prompt`
    (`calm.text.chunking.num_begins`, traced)."""
    fill = -num_tokens % chunk_size
    return jnp.where((prompt == 0) & (fill == 0), chunk_size, fill)


# -- acceptance -------------------------------------------------------------------------------------------------------


def keep_matching(
    drafts: Int[Array, "K"], proposed: Int[Array, ""], target: Float[Array, "K+1 V"], choice: Float[Array, "K+1 2"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Number of the first `proposed` drafts that equal the token model's draws, and its token after them.

    `target` are its distributions up to a factor. Kept tokens are its own draws, whatever was proposed.
    """
    own = draw_places(choice[:, None], target)[:, 0]
    right = (drafts == own[:-1]) & (jnp.arange(len(drafts)) < proposed)
    kept = jnp.cumprod(right.astype(jnp.int32)).sum()
    return kept, own[kept]


def accept_or_resample(
    drafts: Int[Array, "K"],
    proposed: Int[Array, ""],
    probs: Float[Array, "K V"],
    target: Float[Array, "K+1 V"],
    accept: Float[Array, "K+1"],
    choice: Float[Array, "K+1 2"],
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Number of the first `proposed` drafts that are kept, and the token after them.

    A draft x drawn from q is kept with probability min(1, p(x)/q(x)); the first one that is not is replaced by a token from
    (p - q)+; after the last one a token is drawn from p. Then every position has the distribution p: min(p, q) +
    (1 - sum min(p, q)) (p - q)+ / sum (p - q)+ = p. This holds whatever p and q depend on, as long as x, the coin and the
    replacement are drawn after it. `probs` (q) and `target` (p) are normalised.
    """
    count = jnp.arange(len(drafts))
    p, q = target[count, drafts], probs[count, drafts]
    right = (accept[:-1] * q < p) & (count < proposed)
    kept = jnp.cumprod(right.astype(jnp.int32)).sum()
    here = target[kept]
    rest = jnp.where(kept < proposed, jnp.maximum(here - probs[jnp.minimum(kept, len(drafts) - 1)], 0.0), here)
    # p = q up to rounding leaves nothing to draw from, and only rounding can reject there
    rest = jnp.where(rest.sum() > 0, rest, here)
    return kept, draw_places(choice[kept][None, None], rest[None])[0, 0]


# -- proposals ---------------------------------------------------------------------------------------------------------


class Speculation:
    """Both models inside a compiled loop."""

    def __init__(
        self, drafting: Drafting, sampler: SoftmaxSampler, target: Weights, proposer: Weights, mask: Float[Array, "V"]
    ):
        self.drafting, self.sampler, self.mask = drafting, sampler, mask
        self.target: TokenLM = target.model.merge()
        self.predictor: NextVector = proposer.model.merge()
        self.target_table, self.proposer_table, self.end_id = target.table, proposer.table, target.end_id
        self.size = self.predictor.chunk_size

    def target_probs(self, hidden: Float[Array, "X D"]) -> Float[Array, "X V"]:
        """Distributions from which the token model draws."""
        states = operand(self.target.head(hidden), self.target.precision)
        return self._probs(product(states, self.target_table.columns)[:, : len(self.mask)] + self.mask)

    def _probs(self, logits: Float[Array, "X V"]) -> Float[Array, "X V"]:
        weights = self.sampler.weights(logits)
        return weights / weights.sum(-1, keepdims=True)

    def parts(self, key: PRNGKey, hidden: Float[Array, "1 D"]) -> Float[Array, "X *d"]:
        """Draws latents and runs the part of the decoder that does not depend on tokens."""
        predictor = self.predictor
        writer = predictor.lm.context_decoder
        if writer is not None and not writer.reads_latent:
            return writer.plan(hidden, None)[:, 0]
        noise = predictor.draw_noise(key, (self.drafting.num_latents, 1)).latent
        assert noise is not None
        latents = predictor.lm.head(hidden, noise)
        made = predictor.autoencoder.decode_states(latents) if writer is None else writer.plan(hidden, latents)
        return made[:, 0]

    def log_probs(
        self, parts: Float[Array, "X *d"], place: Int[Array, ""], window: Int[Array, "w"], memory: Memory | None
    ) -> Float[Array, "X V"]:
        """Log distribution, given each latent, of the token at `place` of the chunk after the tokens before it."""
        predictor, writer = self.predictor, self.predictor.lm.context_decoder
        if writer is None:
            states = parts[:, place]
        else:
            count = len(parts)
            windows = jnp.broadcast_to(window, (count, len(window)))
            recalled = writer.recalled_behind(memory, window)
            states = writer.states(parts, windows, jnp.broadcast_to(place, (count,)), recalled)
        logits = product(operand(states, predictor.precision), self.proposer_table.columns)[:, : len(self.mask)] + self.mask
        return jax.nn.log_softmax(logits)

    def catch_up(self, key: PRNGKey, row: Row, start: int) -> tuple[Proposer, Int[Array, ""], Array, Array]:
        """Lets CALM read up to the chunk to be drafted. Returns its state, where the chunk begins, and the numbers of
        chunks read and of plans made."""
        proposer, size = row.proposer, self.size
        if self.drafting.boundaries == "kept":
            boundary, phase = start + row.written // size * size, jnp.int32(0)
        else:
            boundary, phase = start + row.written, -row.written % size

        def refresh(proposer: Proposer) -> tuple[Proposer, Int[Array, ""]]:
            layers = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, phase, 1), proposer.layers)
            starts = proposer.starts[phase][None]
            width = self.predictor.lm.config.backbone.dim

            def step(carry: tuple[Array, Array, Any, Array]) -> tuple[Array, Array, Any, Array]:
                read, offset, layers, _ = carry
                chunk = jax.lax.dynamic_slice(row.text, (read,), (size,))
                state = BackboneState(Window(offset, starts), layers)
                hidden, state = self.predictor.hidden(chunk[None, None], state)
                return read + size, offset + 1, state.layers, hidden[:, 0]

            before = (proposer.read[phase], proposer.offset[phase], layers, jnp.zeros((1, width)))
            read, offset, layers, hidden = jax.lax.while_loop(lambda carry: carry[0] < boundary, step, before)
            whole = jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, phase, 0), proposer.layers, layers)
            parts = self.parts(stream(key, "latents", boundary - start), hidden)
            fresh = Proposer(
                layers=whole,
                offset=proposer.offset.at[phase].set(offset),
                starts=proposer.starts,
                read=proposer.read.at[phase].set(read),
                parts=parts,
                log_weights=jnp.zeros(len(parts)),
                place=jnp.int32(0),
            )
            return fresh, offset - proposer.offset[phase]

        if self.drafting.boundaries == "moved":  # every pass begins another chunk
            proposer, chunks = refresh(proposer)
            return proposer, boundary, chunks, jnp.int32(1)
        due = proposer.read[0] < boundary
        proposer, chunks = jax.lax.cond(due, refresh, lambda same: (same, jnp.int32(0)), proposer)
        return proposer, boundary, chunks, due.astype(jnp.int32)

    def propose(
        self,
        proposer: Proposer,
        text: Int[Array, "T"],
        boundary: Int[Array, ""],
        known: Int[Array, ""],
        first: Int[Array, ""],
        numbers: Float[Array, "K 2"],
    ) -> Draft:
        """Drafts for the positions from `known` on, each from the mixture of the decoder's distributions given the latents.

        A latent's weight is the probability that it gives to the chunk's tokens so far (Bayes), so the drafts together
        follow the mixture of the chunk distributions. With the latents fixed, each draft is drawn from a distribution
        given the tokens before it, as the rules require. `first` is where the text that CALM has read begins;
        `numbers[i]` draws the i-th draft.
        """
        size, writer = self.size, self.predictor.lm.context_decoder
        count, width, memory = len(proposer.parts), 0 if writer is None else writer.config.window, None
        if writer is not None:
            memory = writer.remember(tokens_before(text, boundary, writer.config.reach, first))

        def step(carry: tuple[Array, Draft, Array]) -> tuple[Array, Draft, Array]:
            place, draft, log_weights = carry
            at = boundary + place
            log_probs = self.log_probs(proposer.parts, place, tokens_before(draft.text, at, width, first), memory)
            mixture = jax.nn.logsumexp(log_weights[:, None] + log_probs, axis=0)
            own = self._probs(mixture[None])[0]
            number = jnp.maximum(place - known, 0)
            drawn = draw_places(numbers[number][None, None], own[None])[0, 0]
            token = jnp.where(place < known, draft.text[at], drawn)
            history = draft.history.at[place].set(log_weights)
            probs = draft.probs
            if probs is not None:
                probs = probs.at[jnp.where(place < known, size, number)].set(own, mode="drop")
            made = Draft(draft.text.at[at].set(token), probs, history, draft.places + 1)
            return place + 1, made, log_weights + log_probs[:, token]

        # the weight of a single latent does not change, so the known tokens need not be read again
        begin = known if count == 1 else proposer.place
        probs = jnp.zeros((size, len(self.mask))) if self.drafting.rule == "accept" else None
        empty = Draft(text, probs, jnp.zeros((size, count)), jnp.int32(0))
        return jax.lax.while_loop(lambda carry: carry[0] < size, step, (begin, empty, proposer.log_weights))[1]

    def advance(self, key: PRNGKey, uniforms: Uniforms, prompt: Int[Array, ""], layout: Layout, row: Row) -> Row:
        """One pass."""
        size = self.size
        proposer, boundary, chunks, plans = self.catch_up(key, row, layout.start)
        end = layout.start + row.written
        known, fill = end - boundary, begins_before(prompt, prompt + boundary - layout.start, size)
        proposed = size - known

        def numbers(x: Array, length: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, row.written, length)

        # Drafts to be matched use the numbers of the draws that they are to match.
        own = uniforms.choice if self.drafting.rule == "match" else uniforms.draft
        draft = self.propose(proposer, row.text, boundary, known, layout.start - prompt - fill, numbers(own, size))

        # Positions after the drafts are read as well, and their results ignored.
        block = jax.lax.dynamic_slice(draft.text, (end - 1,), (size + 1,))
        hidden, target = self.target.hidden(block[None, :, None], row.target)
        target_probs = self.target_probs(hidden[0])
        choice = numbers(uniforms.choice, size + 1)
        if draft.probs is None:
            kept, token = keep_matching(block[1:], proposed, target_probs, choice)
        else:
            accept = numbers(uniforms.accept, size + 1)
            kept, token = accept_or_resample(block[1:], proposed, draft.probs, target_probs, accept, choice)

        # The drafts are in the text; the token model's own token replaces the first one that was not kept.
        text = draft.text.at[end + kept].set(token)
        fresh = jax.lax.dynamic_slice(text, (end,), (size + 1,))
        ends = (fresh == self.end_id) & (jnp.arange(size + 1) <= kept)
        before_end = jnp.where(ends.any(), jnp.argmax(ends), kept + 1).astype(jnp.int32)
        place = jnp.minimum(known + kept, size - 1)
        counts = Counts(passes=jnp.int32(1), proposed=proposed, accepted=kept, chunks=chunks, plans=plans, places=draft.places)
        assert target is not None and isinstance(row.target.window, Window)
        return Row(
            target=self.target.backbone.rewind(target, row.target.window.offset + kept + 1),  # all but the last token
            proposer=proposer._replace(log_weights=draft.history[place], place=place),
            text=text,
            written=row.written + kept + 1,
            ended=ends.any(),
            length=row.length + before_end,
            counts=jax.tree.map(jnp.add, row.counts, counts),
        )


def read_prompt(drafting: Drafting, models: Models, text: Int[Array, "T"], prompt: Int[Array, ""], layout: Layout) -> Row:
    """Reads a prompt of `prompt` tokens with both models, except the last token (target) and the last chunk (proposer);
    further phases are read up to their last chunk boundary inside the prompt."""
    token_lm: TokenLM = models.target.merge()
    predictor: NextVector = models.proposer.merge()
    size, start, length = predictor.chunk_size, layout.start, layout.prompt_chunks

    tokens = length * size
    first = tokens - jnp.maximum(prompt - 1, 0)
    state = token_lm.init_state(1, tokens + layout.capacity, first[None], rewindable=True)
    state = token_lm.hidden(text[start - 1 - tokens : start - 1][None, :, None], state)[1]
    state = state._replace(layers=unstack(state.layers, token_lm.num_layers))

    backs = [size, *range(1, size)] if drafting.boundaries == "moved" else [size]  # row r: boundaries r + n K tokens back
    chunks = jnp.stack([text[start - back - tokens : start - back].reshape(length, size) for back in backs])
    starts = length - jnp.maximum(0, -((jnp.asarray(backs) - prompt) // size))  # a first chunk that is not whole is filled up
    rows = len(backs)
    own = predictor.init_state(rows, length + layout.capacity // size + 1, starts)
    own = predictor.hidden(chunks, own)[1]

    writer = predictor.lm.context_decoder
    count = 1 if writer is not None and not writer.reads_latent else drafting.num_latents
    shape = (size, predictor.table.shape[1]) if writer is None else (writer.config.dim,)
    proposer = Proposer(
        layers=unstack(own.layers, predictor.num_layers),
        offset=jnp.full((rows,), length, jnp.int32),
        starts=starts,
        read=start - jnp.asarray(backs, jnp.int32),
        parts=jnp.zeros((count, *shape)),
        log_weights=jnp.zeros((count,)),
        place=jnp.int32(0),
    )
    zero = jnp.zeros((), jnp.int32)
    return Row(state, proposer, text, zero, zero.astype(bool), zero, Counts(*[zero] * len(Counts._fields)))


@partial(jax.jit, static_argnums=0)
def run(
    plan: Plan, models: Models, prompts: Prompts, max_tokens: Int[Array, ""]
) -> tuple[Int[Array, "B X"], Int[Array, "B"], Bool[Array, "B"], Counts]:
    """Continues rows one after the other. Returns their tokens, lengths, whether they ended, and the work done.

    A row stops at its first end token or after `max_tokens`. Rows of a batch accept different numbers of tokens, so a pass
    for all would wait for the slowest; the weights are read once for each row either way when K + 1 positions are many.
    """
    speculation = Speculation(plan.drafting, plan.sampler, models.target_weights, models.proposer_weights, models.mask)

    def one(row: Prompts) -> tuple[Array, Array, Array, Counts]:
        uniforms = draw_uniforms(row.keys, plan.layout.capacity)
        done = jax.lax.while_loop(
            lambda state: ~state.ended & (state.written < max_tokens),
            lambda state: speculation.advance(row.keys, uniforms, row.lengths, plan.layout, state),
            read_prompt(plan.drafting, models, row.texts, row.lengths, plan.layout),
        )
        return done.text[plan.layout.start :], done.length, done.ended, done.counts

    return jax.lax.map(one, prompts)
