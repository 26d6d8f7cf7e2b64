"""The device side of drafting: a next-vector model proposes, a token model reads all of it in one pass and decides.

One pass: CALM reads a chunk if one has been completed and draws latents; the places that are left in the chunk are drafted one
after the other; the token model reads its last token and the drafts as one block; a rule keeps a first part of them and adds
one token of the token model's own. Everything stays in one compiled loop, one row at a time (docs/drafting.md).
"""

import dataclasses
import zlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from calm.core.backbone import BackboneState
from calm.core.dense import operand, product
from calm.core.mixer import Window
from calm.core.predictor import NextVector
from calm.core.steps import Model, Weights, step_keys
from calm.core.unrolled import unstack
from calm.decoders.recall import Memory
from calm.dual.acceptance import accept_or_resample, keep_matching
from calm.dual.row_text import begins_before, tokens_before
from calm.errors import UsageError
from calm.rng import PRNGKey, stream
from calm.token.model import TokenLM
from calm.token.sampler import SoftmaxSampler
from calm.token.softmax_head import draw_places

RULES, BOUNDARIES = ("accept", "match"), ("kept", "moved")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting:
    """How tokens are proposed and which are kept."""

    rule: str = "accept"
    """accept: a draft from q is kept with probability min(1, p/q), else a token from (p - q)+ takes its place (Leviathan et al.
    2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318); match: what equals the token model's own draw is kept"""
    num_latents: int = 1
    """S latents behind a draft: q is the mixture of what the decoder makes of each"""
    boundaries: str = "kept"
    """where CALM goes on after a draft was kept in part: kept, at the chunk that it was in, of which some tokens are known now;
    moved, at a chunk that begins with the next token, out of K states with boundaries a token apart"""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UsageError(f"drafting: rule must be accept or match, got {self.rule!r}")
        if self.boundaries not in BOUNDARIES:
            raise UsageError(f"drafting: boundaries must be kept or moved, got {self.boundaries!r}")
        if self.num_latents < 1:
            raise UsageError(f"drafting: num_latents must be at least 1, got {self.num_latents}")


class Counts(NamedTuple):
    """What was done for a row."""

    passes: Int[Array, ""]
    """of the token model, each over K + 1 positions"""
    proposed: Int[Array, ""]
    """tokens that CALM drafted"""
    accepted: Int[Array, ""]
    """drafted tokens that were kept"""
    chunks: Int[Array, ""]
    """chunks that CALM read, those of the prompt not included"""
    plans: Int[Array, ""]
    """times at which S latents were drawn"""
    places: Int[Array, ""]
    """places at which the decoder was asked for its law, of all S latents"""


class Uniforms(NamedTuple):
    """The randomness of every place of the continuation, by its number alone: what a pass finds rejected, a later pass decides
    anew with numbers that nothing before it depends on."""

    choice: Float[Array, "T 2"]
    """the numbers with which the token model alone would draw (`calm.token.sampler.SoftmaxSampler`)"""
    draft: Float[Array, "T 2"]
    accept: Float[Array, "T"]


class Layout(NamedTuple):
    """Where things stand in the text of a row, which is right-aligned: begin ids, the prompt, then from `start` on what is
    written."""

    start: int
    prompt_chunks: int
    """chunks that a prompt may have, padding included"""
    capacity: int
    """tokens that may be written, with what the last pass writes too much"""


class Proposer(NamedTuple):
    """What CALM has read and what it makes of it."""

    layers: Any
    """states of its layers: a row for every phase of its chunks that is kept up to date"""
    offset: Int[Array, "P"]
    starts: Int[Array, "P"]
    read: Int[Array, "P"]
    """how far each phase has read the text"""
    parts: Float[Array, "X *d"]
    """one for each latent: the decoder's states of the chunk, or the context decoder's plan of it"""
    log_weights: Float[Array, "X"]
    """of the latents, by the tokens of the chunk before `place`"""
    place: Int[Array, ""]


class Draft(NamedTuple):
    """A proposal."""

    text: Int[Array, "T"]
    """with the drafts behind its end"""
    laws: Float[Array, "K V"] | None
    """of each draft, given the latents and the tokens before it; none where the rule does not ask"""
    history: Float[Array, "K X"]
    """weights of the latents before each place of the chunk"""
    places: Int[Array, ""]


class Row(NamedTuple):
    """Everything that a pass hands to the next one."""

    target: BackboneState
    """of the token model: has read all tokens but the last"""
    proposer: Proposer
    text: Int[Array, "T"]
    written: Int[Array, ""]
    ended: Bool[Array, ""]
    length: Int[Array, ""]
    """tokens before the end token"""
    counts: Counts


def uniforms_of(key: PRNGKey, count: int) -> Uniforms:
    """For `count` places; those of `choice` are what `calm.core.generate` draws a token model's tokens with."""

    def at(step: Int[Array, ""]) -> tuple[Array, Array]:
        choice = jax.random.uniform(step_keys(key[None], step).choice[0], (1, 2))[0]
        own = jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(b"drafting")), step)
        return choice, jax.random.uniform(own, (3,))

    choice, own = jax.vmap(at)(jnp.arange(count))
    return Uniforms(choice, own[:, :2], own[:, 2])


# -- proposals ---------------------------------------------------------------------------------------------------------


class Speculation:
    """The two models and how they work together, inside a compiled loop."""

    def __init__(self, recipe: Drafting, law: SoftmaxSampler, target: Weights, draft: Weights, mask: Float[Array, "V"]):
        self.recipe, self.law, self.mask = recipe, law, mask
        self.target: TokenLM = target.model.merge()
        self.predictor: NextVector = draft.model.merge()
        self.target_table, self.draft_table, self.end_id = target.table, draft.table, target.end_id
        self.size = self.predictor.chunk_size

    def target_laws(self, hidden: Float[Array, "X D"]) -> Float[Array, "X V"]:
        """What the token model draws from."""
        states = operand(self.target.head(hidden), self.target.precision)
        return self._law(product(states, self.target_table.columns)[:, : len(self.mask)] + self.mask)

    def _law(self, logits: Float[Array, "X V"]) -> Float[Array, "X V"]:
        weights = self.law.weights(logits)
        return weights / weights.sum(-1, keepdims=True)

    def parts(self, key: PRNGKey, hidden: Float[Array, "1 D"]) -> Float[Array, "X *d"]:
        """Latents drawn, and what of the decoder does not wait for tokens."""
        predictor = self.predictor
        writer = predictor.lm.context_decoder
        if writer is not None and not writer.config.use_latent:
            return writer.plan(hidden, None)[:, 0]
        noise = predictor.draw_noise(key, (self.recipe.num_latents, 1)).latent
        assert noise is not None
        latents = predictor.lm.head(hidden, noise)
        made = predictor.autoencoder.decode_states(latents) if writer is None else writer.plan(hidden, latents)
        return made[:, 0]

    def log_probs(
        self, parts: Float[Array, "X *d"], place: Int[Array, ""], window: Int[Array, "w"], memory: Memory | None
    ) -> Float[Array, "X V"]:
        """Of each latent: the law of the token at `place` of the chunk, given the tokens before it."""
        predictor, writer = self.predictor, self.predictor.lm.context_decoder
        if writer is None:
            states = parts[:, place]
        else:
            count = len(parts)
            windows = jnp.broadcast_to(window, (count, len(window)))
            recalled = writer.recalled_behind(memory, window)
            states = writer.states(parts, windows, jnp.broadcast_to(place, (count,)), recalled)
        logits = product(operand(states, predictor.precision), self.draft_table.columns)[:, : len(self.mask)] + self.mask
        return jax.nn.log_softmax(logits)

    def follow(self, key: PRNGKey, row: Row, start: int) -> tuple[Proposer, Int[Array, ""], Array, Array]:
        """CALM brought up to the chunk that is to be drafted: it, where the chunk begins, chunks read, plans made."""
        proposer, size = row.proposer, self.size
        if self.recipe.boundaries == "kept":
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

            begun = (proposer.read[phase], proposer.offset[phase], layers, jnp.zeros((1, width)))
            read, offset, layers, hidden = jax.lax.while_loop(lambda carry: carry[0] < boundary, step, begun)
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

        if self.recipe.boundaries == "moved":  # every pass begins another chunk
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
        """Drafts for the places from `known` on, each from the mixture of the latents' laws; a latent weighs as much as it
        makes the chunk's tokens so far probable (Bayes), so that the drafts together follow the mixture of the chunks' laws.

        With the latents drawn and held fixed, what a draft is drawn from is a law given the tokens before it, which is all that
        the rules ask. `first` is where the text that CALM has read begins; `numbers[i]` draws the i-th draft.
        """
        size, keeps_laws, writer = self.size, self.recipe.rule == "accept", self.predictor.lm.context_decoder
        count, width, memory = len(proposer.parts), 0 if writer is None else writer.config.window, None
        if writer is not None:
            memory = writer.remember(tokens_before(text, boundary, writer.config.reach, first))

        def step(carry: tuple[Array, Draft, Array]) -> tuple[Array, Draft, Array]:
            place, draft, log_weights = carry
            at = boundary + place
            log_probs = self.log_probs(proposer.parts, place, tokens_before(draft.text, at, width, first), memory)
            mixture = jax.nn.logsumexp(log_weights[:, None] + log_probs, axis=0)
            law = self._law(mixture[None])[0]
            number = jnp.maximum(place - known, 0)
            drawn = draw_places(numbers[number][None, None], law[None])[0, 0]
            token = jnp.where(place < known, draft.text[at], drawn)
            history = draft.history.at[place].set(log_weights)
            laws = draft.laws
            if laws is not None:
                laws = laws.at[jnp.where(place < known, size, number)].set(law, mode="drop")
            made = Draft(draft.text.at[at].set(token), laws, history, draft.places + 1)
            return place + 1, made, log_weights + log_probs[:, token]

        # one latent weighs what it weighs: what is known need not be read again
        begin = known if count == 1 else proposer.place
        laws = jnp.zeros((size, len(self.mask))) if keeps_laws else None
        empty = Draft(text, laws, jnp.zeros((size, count)), jnp.int32(0))
        return jax.lax.while_loop(lambda carry: carry[0] < size, step, (begin, empty, proposer.log_weights))[1]

    def advance(self, key: PRNGKey, uniforms: Uniforms, prompt: Int[Array, ""], layout: Layout, row: Row) -> Row:
        """One pass."""
        size = self.size
        proposer, boundary, chunks, plans = self.follow(key, row, layout.start)
        end = layout.start + row.written
        known, fill = end - boundary, begins_before(prompt, prompt + boundary - layout.start, size)
        proposed = size - known

        def numbers(x: Array, length: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, row.written, length)

        # Drafts that are to be matched share the numbers of the draws that they are to match.
        own = uniforms.choice if self.recipe.rule == "match" else uniforms.draft
        draft = self.propose(proposer, row.text, boundary, known, layout.start - prompt - fill, numbers(own, size))

        # What stands behind the drafts is read as well, and nothing looks at what comes of it.
        block = jax.lax.dynamic_slice(draft.text, (end - 1,), (size + 1,))
        hidden, target = self.target.hidden(block[None, :, None], row.target)
        laws = self.target_laws(hidden[0])
        choice = numbers(uniforms.choice, size + 1)
        if draft.laws is None:
            kept, token = keep_matching(block[1:], proposed, laws, choice)
        else:
            accept = numbers(uniforms.accept, size + 1)
            kept, token = accept_or_resample(block[1:], proposed, draft.laws, laws, accept, choice)

        # The drafts stand in the text already; the token model's own token replaces the first one that was not kept.
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


def begin(recipe: Drafting, target: Model, draft: Model, text: Int[Array, "T"], prompt: Int[Array, ""], layout: Layout) -> Row:
    """Reads a prompt of `prompt` tokens with both models, layers still stacked: all of it but the last token and the last
    chunk. Phases of chunks that end inside the prompt are read to their last boundary before its end."""
    token_lm: TokenLM = target.merge()
    predictor: NextVector = draft.merge()
    size, start, length = predictor.chunk_size, layout.start, layout.prompt_chunks

    tokens = length * size
    began = tokens - jnp.maximum(prompt - 1, 0)
    state = token_lm.init_state(1, tokens + layout.capacity, began[None], rewindable=True)
    state = token_lm.hidden(text[start - 1 - tokens : start - 1][None, :, None], state)[1]
    state = state._replace(layers=unstack(state.layers, token_lm.num_layers))

    backs = [size, *range(1, size)] if recipe.boundaries == "moved" else [size]  # row r: boundaries r + n K tokens back
    chunks = jnp.stack([text[start - back - tokens : start - back].reshape(length, size) for back in backs])
    starts = length - jnp.maximum(0, -((jnp.asarray(backs) - prompt) // size))  # the first is filled up, if it is not whole
    rows = len(backs)
    own = predictor.init_state(rows, length + layout.capacity // size + 1, starts)
    own = predictor.hidden(chunks, own)[1]

    writer = predictor.lm.context_decoder
    count = 1 if writer is not None and not writer.config.use_latent else recipe.num_latents
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


@partial(jax.jit, static_argnums=(0, 1, 2))
def run(
    recipe: Drafting,
    law: SoftmaxSampler,
    layout: Layout,
    models: tuple[Model, Model],
    weights: tuple[Weights, Weights],
    mask: Float[Array, "V"],
    keys: Array,
    texts: Int[Array, "B T"],
    prompts: Int[Array, "B"],
    max_tokens: Int[Array, ""],
) -> tuple[Int[Array, "B X"], Int[Array, "B"], Bool[Array, "B"], Counts]:
    """Rows one after the other: what each wrote, its length, whether it ended, and what was done for it.

    A row stops at its first end token or behind `max_tokens`. Rows of one batch accept different numbers of tokens, so one pass
    for all would wait for the slowest; the weights are read once for each row either way when K + 1 positions are many.
    """
    together = Speculation(recipe, law, *weights, mask)

    def row(one: tuple[Array, Array, Array]) -> tuple[Array, Array, Array, Counts]:
        key, text, prompt = one
        uniforms = uniforms_of(key, layout.capacity)
        begun = begin(recipe, *models, text, prompt, layout)
        done = jax.lax.while_loop(
            lambda row: ~row.ended & (row.written < max_tokens),
            lambda row: together.advance(key, uniforms, prompt, layout, row),
            begun,
        )
        return done.text[layout.start :], done.length, done.ended, done.counts

    return jax.lax.map(row, (keys, texts, prompts))
