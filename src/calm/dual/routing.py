"""Writing by two models in turns of a chunk: CALM in one step, or the token model in K, as a router says.

Unlike drafting this changes the law of the text: a chunk that CALM writes is CALM's. The token model reads it in blocks when
its turn comes; until then it waits. Chunk boundaries stay where the prompt's end put them, as both write K tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core import steps
from calm.core.backbone import BackboneState
from calm.core.generate import HasSpecialIds
from calm.core.mixer import Window
from calm.core.predictor import Predictor
from calm.core.sampler import PlainSampler, Sampler
from calm.core.steps import Model, ModelSource, Weights, step_keys
from calm.dual.drafting import checked_models, lay_out, mask_of
from calm.dual.router import Router
from calm.dual.row_text import begins_before, tokens_before
from calm.dual.speculation import Drafting, Layout, Speculation, begin, uniforms_of
from calm.errors import UsageError
from calm.token.sampler import SoftmaxSampler
from calm.token.softmax_head import draw_places


class Routed(NamedTuple):
    """Continuations, and who wrote them."""

    tokens: Int[np.ndarray, "B T"]
    """the prompt not included; after a row's end, end ids"""
    lengths: Int[np.ndarray, "B"]
    ended: Bool[np.ndarray, "B"]
    chunks: Int[np.ndarray, "B"]
    """chunks written"""
    by_tokens: Int[np.ndarray, "B"]
    """those of them that the token model wrote"""


class Row(NamedTuple):
    """Everything that one chunk hands to the next."""

    target: BackboneState
    """of the token model, which may lie any number of tokens behind, one at least"""
    state: BackboneState
    """of CALM: has read all chunks but the last"""
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
    law: SoftmaxSampler | None = None,
    sampler: Sampler | None = None,
    decoding: str | None = None,
    context: int | None = None,
    banned: Sequence[int] = (),
) -> Routed:
    """Continues B prompts by chunks, each from the token model `target` where `router` expects a gap above `threshold`, else
    from CALM. `law` is how tokens are drawn, `sampler` and `decoding` how chunks are (`calm.core.generate`).

    At a threshold of infinity it writes what `generate` writes with CALM and the same keys, at minus infinity what it writes
    with the token model.

    Raises:
        UsageError: models or a router that do not go together, prompts that do not fit.
    """
    target, proposer = checked_models(target, proposer)
    width = proposer.lm.config.backbone.dim
    if router.config.dim != width:
        raise UsageError(f"router: made for hidden states of width {router.config.dim}, this model's are {width} wide")
    laid = lay_out(proposer, prompts, keys, special, max_tokens, context)
    mask = mask_of(target.vocab_size, special, banned)
    every, allowed = jnp.arange(target.vocab_size, dtype=jnp.int32), jnp.asarray(np.flatnonzero(np.isfinite(mask)), jnp.int32)
    models = (Model(*nnx.split(target)), Model(*nnx.split(proposer)))
    end = jnp.int32(special.end_id)
    weights = (steps.prepare(models[0], every, end), steps.prepare(models[1], allowed, end))
    recipe = _Recipe(law or SoftmaxSampler(), sampler or PlainSampler(), decoding or proposer.decoding)
    limits = (jnp.float32(threshold), jnp.int32(-(-max_tokens // proposer.chunk_size)))
    tokens, lengths, ended, chunks, by_tokens = jax.device_get(
        _run(recipe, laid.layout, models, weights, Model(*nnx.split(router)), mask, keys, laid.texts, laid.lengths, limits)
    )
    tokens = np.where(np.arange(max_tokens) < lengths[:, None], tokens[:, :max_tokens], special.end_id)
    return Routed(tokens, np.minimum(lengths, max_tokens), ended & (lengths < max_tokens), chunks, by_tokens)


class _Recipe(NamedTuple):
    law: SoftmaxSampler
    sampler: Sampler
    decoding: str


@partial(jax.jit, static_argnums=(0, 1))
def _run(
    recipe: _Recipe,
    layout: Layout,
    models: tuple[Model, Model],
    weights: tuple[Weights, Weights],
    router: Model,
    mask: Float[Array, "V"],
    keys: Array,
    texts: Int[Array, "B T"],
    prompts: Int[Array, "B"],
    limits: tuple[Float[Array, ""], Int[Array, ""]],
) -> tuple[Int[Array, "B X"], Int[Array, "B"], Bool[Array, "B"], Int[Array, "B"], Int[Array, "B"]]:
    """Rows one after the other, as in drafting: each chooses for itself, so a batch would do the work of both models."""
    together = Speculation(Drafting(), recipe.law, *weights, mask)
    predictor, token_lm, size = together.predictor, together.target, together.size
    chooser: Router = router.merge()
    threshold, most = limits

    def one(each: tuple[Array, Array, Array]) -> tuple[Array, ...]:
        key, text, prompt = each
        choices = uniforms_of(key, layout.capacity).choice
        first = layout.start - prompt - begins_before(prompt, prompt, size)

        def by_tokens(row: Row) -> tuple[Array, Any]:
            """K tokens, one after the other, behind all that has not been read."""
            at = layout.start + size * row.chunks
            back = layout.start - size * layout.prompt_chunks - 1  # the place in the text of the state's first position

            def read(state: BackboneState) -> tuple[Array, Any]:
                block = jax.lax.dynamic_slice(row.text, (back + offset_of(state),), (size,))
                hidden, after = token_lm.hidden(block[None, :, None], state)
                return hidden[0], after

            state = jax.lax.while_loop(
                lambda state: at - back - offset_of(state) > size, lambda state: read(state)[1], row.target
            )
            due = at - back - offset_of(state)
            behind = offset_of(state) + due
            hidden, state = read(state)
            state = token_lm.backbone.rewind(state, behind)

            def write(carry: tuple[Array, Any], number: Array) -> tuple[tuple[Array, Any], Array]:
                hidden, state = carry
                token = draw_places(number[None, None], together.target_laws(hidden[None]))[0, 0].astype(jnp.int32)
                after, state = token_lm.hidden(token[None, None, None], state)
                return (after[0, 0], state), token

            numbers = jax.lax.dynamic_slice_in_dim(choices, size * row.chunks, size)
            (_, state), tokens = jax.lax.scan(write, (hidden[due - 1], state), numbers)
            return tokens, token_lm.backbone.rewind(state, behind + size - 1)

        def step(row: Row) -> Row:
            at = layout.start + size * row.chunks
            chunk = jax.lax.dynamic_slice(row.text, (at - size,), (size,))
            hidden, state = predictor.hidden(chunk[None, None], row.state)
            previous = tokens_before(row.text, at, predictor.reach, first)[None]

            def by_chunk(row: Row) -> tuple[Array, Any]:
                own = step_keys(key[None], row.chunks)
                nothing = jnp.zeros((1, 0), jnp.int32)
                source = ModelSource(
                    predictor, weights[1].table, recipe.decoding, hidden[:, 0], previous, nothing, ~row.ended[None]
                )
                return recipe.sampler.sample(own, source).chunk[0], row.target

            turn = chooser(hidden[0, 0]) > threshold
            fresh, target = jax.lax.cond(turn, by_tokens, by_chunk, row)
            ends = fresh == together.end_id
            return Row(
                target=target,
                state=state,
                text=jax.lax.dynamic_update_slice(row.text, fresh, (at,)),
                chunks=row.chunks + 1,
                by_tokens=row.by_tokens + turn,
                ended=ends.any(),
                length=row.length + jnp.where(ends.any(), jnp.argmax(ends), size).astype(jnp.int32),
            )

        begun = begin(Drafting(), *models, text, prompt, layout)
        own = begun.proposer
        zero = jnp.zeros((), jnp.int32)
        row = Row(
            begun.target, BackboneState(Window(own.offset[0], own.starts), own.layers), text, zero, zero, begun.ended, zero
        )
        done = jax.lax.while_loop(lambda row: ~row.ended & (row.chunks < most), step, row)
        return done.text[layout.start :], done.length, done.ended, done.chunks, done.by_tokens

    return jax.lax.map(one, (keys, texts, prompts))


def offset_of(state: BackboneState) -> Int[Array, ""]:
    """Positions read, padding included."""
    assert isinstance(state.window, Window)
    return state.window.offset
