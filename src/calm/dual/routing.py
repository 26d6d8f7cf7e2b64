"""Generation by two models that alternate chunk by chunk: CALM in one step, or the token model in K, as a router decides.

Unlike drafting this changes the distribution of the text: a chunk that CALM writes is CALM's. The token model reads such
chunks in blocks when its turn comes. Chunk boundaries stay where the end of the prompt put them, as both write K tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.generate import HasSpecialIds
from calm.core.mixer import Window
from calm.core.predictor import Predictor
from calm.core.sampler import PlainSampler, Sampler
from calm.core.steps import Model, ModelSource, step_keys
from calm.core.transformer import BackboneState
from calm.core.vocabulary import draw_places
from calm.dual.drafting import checked_models, combined, lay_out
from calm.dual.router import Router
from calm.dual.speculation import (
    Drafting,
    Layout,
    Models,
    Prompts,
    Speculation,
    begins_before,
    draw_uniforms,
    read_prompt,
    tokens_before,
)
from calm.errors import UsageError
from calm.token.sampler import SoftmaxSampler


class Routed(NamedTuple):
    """Continuations, and the number of chunks by each model."""

    tokens: Int[np.ndarray, "B T"]
    """the prompt not included; after a row's end, end ids"""
    lengths: Int[np.ndarray, "B"]
    ended: Bool[np.ndarray, "B"]
    chunks: Int[np.ndarray, "B"]
    """chunks written"""
    by_tokens: Int[np.ndarray, "B"]
    """of those, chunks that the token model wrote"""


class Row(NamedTuple):
    """State of a row between chunks."""

    target: BackboneState
    """of the token model, which may lag by any number of tokens, at least one"""
    state: BackboneState
    """of CALM, which has read all chunks but the last"""
    text: Int[Array, "T"]
    chunks: Int[Array, ""]
    by_tokens: Int[Array, ""]
    ended: Bool[Array, ""]
    length: Int[Array, ""]


def route(
    target: Predictor,
    proposer: Predictor,
    router: Router,
    prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]],
    keys: Array,
    *,
    special: HasSpecialIds,
    max_tokens: int,
    threshold: float,
    token_sampler: SoftmaxSampler | None = None,
    sampler: Sampler | None = None,
    decoding: str | None = None,
    context: int | None = None,
    banned: Sequence[int] = (),
) -> Routed:
    """Continues B prompts chunk by chunk: by the token model `target` where `router` expects a gap above `threshold`, else
    by CALM.

    At a threshold of infinity it writes what `generate` writes with CALM and the same keys, at minus infinity what it writes
    with the token model.

    Args:
        token_sampler: sampler of the token model.
        sampler: sampler of CALM's chunks.
        decoding: decoding of CALM's latents (`calm.core.generate`); None = the model's own.

    Raises:
        UsageError: models or a router that do not belong together, prompts that do not fit.
    """
    target, proposer = checked_models(target, proposer)
    width = proposer.lm.config.backbone.dim
    if router.config.dim != width:
        raise UsageError(f"router: made for hidden states of width {router.config.dim}, this model's are {width} wide")
    layout, rows = lay_out(proposer, prompts, keys, special, max_tokens, context)
    plan = _Plan(token_sampler or SoftmaxSampler(), sampler or PlainSampler(), decoding or proposer.decoding, layout)
    models = combined(target, proposer, special, banned, None)
    limits = (jnp.float32(threshold), jnp.int32(-(-max_tokens // proposer.chunk_size)))
    tokens, lengths, ended, chunks, by_tokens = jax.device_get(_run(plan, models, Model(*nnx.split(router)), rows, limits))
    tokens = np.where(np.arange(max_tokens) < lengths[:, None], tokens[:, :max_tokens], special.end_id)
    return Routed(tokens, np.minimum(lengths, max_tokens), ended & (lengths < max_tokens), chunks, by_tokens)


class _Plan(NamedTuple):
    token_sampler: SoftmaxSampler
    sampler: Sampler
    decoding: str
    layout: Layout


@partial(jax.jit, static_argnums=0)
def _run(
    plan: _Plan, models: Models, router: Model, prompts: Prompts, limits: tuple[Float[Array, ""], Int[Array, ""]]
) -> tuple[Int[Array, "B X"], Int[Array, "B"], Bool[Array, "B"], Int[Array, "B"], Int[Array, "B"]]:
    """Continues rows one after the other, as each chooses for itself and a batch would do the work of both models."""
    pair = Speculation(Drafting(), plan.token_sampler, models.target_weights, models.proposer_weights, models.mask)
    predictor, token_lm, size, layout = pair.predictor, pair.target, pair.size, plan.layout
    chooser: Router = router.merge()
    threshold, most = limits

    def one(each: Prompts) -> tuple[Array, ...]:
        key, text, prompt = each
        choices = draw_uniforms(key, layout.capacity).choice
        first = layout.start - prompt - begins_before(prompt, prompt, size)

        def by_tokens(row: Row) -> tuple[Array, Any]:
            """K tokens, one after the other, after reading what the token model has not read."""
            at = layout.start + size * row.chunks
            back = layout.start - size * layout.prompt_chunks - 1  # position in the text of the state's first one

            def read(state: BackboneState) -> tuple[Array, Any]:
                block = jax.lax.dynamic_slice(row.text, (back + offset_of(state),), (size,))
                hidden, after = token_lm.hidden(block[None, :, None], state)
                return hidden[0], after

            state = jax.lax.while_loop(
                lambda state: at - back - offset_of(state) > size, lambda state: read(state)[1], row.target
            )
            due = at - back - offset_of(state)
            position = offset_of(state) + due
            hidden, state = read(state)
            state = token_lm.backbone.rewind(state, position)

            def write(carry: tuple[Array, Any], number: Array) -> tuple[tuple[Array, Any], Array]:
                hidden, state = carry
                token = draw_places(number[None, None], pair.target_probs(hidden[None]))[0, 0].astype(jnp.int32)
                after, state = token_lm.hidden(token[None, None, None], state)
                return (after[0, 0], state), token

            numbers = jax.lax.dynamic_slice_in_dim(choices, size * row.chunks, size)
            (_, state), tokens = jax.lax.scan(write, (hidden[due - 1], state), numbers)
            return tokens, token_lm.backbone.rewind(state, position + size - 1)

        def step(row: Row) -> Row:
            at = layout.start + size * row.chunks
            chunk = jax.lax.dynamic_slice(row.text, (at - size,), (size,))
            hidden, state = predictor.hidden(chunk[None, None], row.state)
            previous = tokens_before(row.text, at, predictor.reach, first)[None]

            def by_chunk(row: Row) -> tuple[Array, Any]:
                own = step_keys(key[None], row.chunks)
                nothing = jnp.zeros((1, 0), jnp.int32)
                source = ModelSource(
                    predictor, models.proposer_weights.table, plan.decoding, hidden[:, 0], previous, nothing, ~row.ended[None]
                )
                return plan.sampler.sample(own, source).chunk[0], row.target

            turn = chooser(hidden[0, 0]) > threshold
            fresh, target = jax.lax.cond(turn, by_tokens, by_chunk, row)
            ends = fresh == pair.end_id
            return Row(
                target=target,
                state=state,
                text=jax.lax.dynamic_update_slice(row.text, fresh, (at,)),
                chunks=row.chunks + 1,
                by_tokens=row.by_tokens + turn,
                ended=ends.any(),
                length=row.length + jnp.where(ends.any(), jnp.argmax(ends), size).astype(jnp.int32),
            )

        start = read_prompt(Drafting(), models, text, prompt, layout)
        own, zero = start.proposer, jnp.zeros((), jnp.int32)
        state = BackboneState(Window(own.offset[0], own.starts), own.layers)
        row = Row(start.target, state, text, zero, zero, start.ended, zero)
        done = jax.lax.while_loop(lambda row: ~row.ended & (row.chunks < most), step, row)
        return done.text[layout.start :], done.length, done.ended, done.chunks, done.by_tokens

    return jax.lax.map(one, prompts)


def offset_of(state: BackboneState) -> Int[Array, ""]:
    """Number of positions read, padding included."""
    assert isinstance(state.window, Window)
    return state.window.offset
