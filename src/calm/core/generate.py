"""Continue prompts: in one compiled call, or chunk by chunk as they come."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core import steps
from calm.core.chunk_decoder import DECODINGS
from calm.core.exact import ExactTemperature
from calm.core.predictor import Predictor
from calm.core.sampler import PlainSampler, Sampler
from calm.core.steps import Model, Progress, Recipe, Weights
from calm.errors import UsageError
from calm.text.chunking import NOTHING, chunk_prompt, pad_prompts

PLAIN = PlainSampler()
LENGTH_STEP = 16  # sequence lengths are rounded up to multiples of it, so that few shapes are compiled


@runtime_checkable
class HasSpecialIds(Protocol):
    """A tokenizer, as far as generation needs it."""

    begin_id: int
    end_id: int
    mask_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The ids that mean something to generation; a tokenizer does as well."""

    begin_id: int
    end_id: int
    mask_id: int


class Generated(NamedTuple):
    """Continuations, and how they came about."""

    tokens: Int[np.ndarray, "B T"]
    """the prompt not included; after a row's end, end ids"""
    lengths: Int[np.ndarray, "B"]
    """tokens of each row before its end token, or before the limit"""
    ended: Bool[np.ndarray, "B"]
    """rows that wrote an end token; the others were cut at the limit"""
    fallback_share: Float[np.ndarray, "B"]
    """share of a row's steps in which the counts could not decide as asked: no chunk came often enough for the temperature
    (`BatchTemperature`), all draws differed (`BestOfN`), or all of them were repetitions"""
    draws: Int[np.ndarray, "B"]
    """chunks that each row used; where draws come in blocks, what is left of the last block is not counted"""
    decoding: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """Settings of `generate` and `stream`, which take them as keywords."""

    special: HasSpecialIds
    """ids that mean something; begin and mask ids are never written"""
    max_tokens: int
    """most tokens to add to each prompt"""
    sampler: Sampler = PLAIN
    decoding: str = "argmax"
    """choice of tokens given a latent: the decoder's "argmax", or "drawn" from its softmax at every place"""
    context: int | None = None
    """most chunks that prompt and continuation may have together, usually those of a training sequence; None = no limit"""
    banned: Sequence[int] = ()
    """ids that are never written: they are left out of the decoder's logits, before its argmax or softmax"""


def generate(
    predictor: Predictor, prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]], keys: Array, **settings: Any
) -> Generated:
    """Continues B prompts of any lengths in one compiled call, without a round trip to the host.

    Args:
        prompts: token ids, possibly none. The end of a prompt is a chunk boundary, and its first T mod K tokens form a chunk
            filled from the left with begin ids.
        keys: `[B]`, one random key a row (`calm.rng.row_keys`). In float32 a row gives the same tokens in any batch, at any
            padding, as alone.
        settings: fields of `GenerationSettings`.

    A row stops at its first end token; the loop stops with its last row. CALM (arXiv:2510.27688) pads the last chunk of a
    prompt and takes prompts of equal length only.

    Raises:
        UsageError: prompts or settings that do not fit.
        OutOfDraws: the exact sampler accepts no chunk within its budget.
    """
    chosen = GenerationSettings(**settings)
    job = _plan(predictor, prompts, keys, chosen)
    progress, chunks = steps.run(
        job.recipe, job.model, job.weights, keys, job.chunks, job.starts, job.history, job.capacity, jnp.int32(job.num_steps)
    )
    _require_chunks(job.recipe, progress)
    batch, chunk_size = job.chunks.shape[0], job.chunks.shape[2]
    tokens = np.asarray(chunks[: job.num_steps]).swapaxes(0, 1).reshape(batch, job.num_steps * chunk_size)
    return _report(progress, tokens[:, : chosen.max_tokens], chosen.decoding)


def stream(
    predictor: Predictor, prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]], keys: Array, **settings: Any
) -> Generator[Int[np.ndarray, "B K"], None, Generated]:
    """The tokens of `generate`, yielded chunk by chunk as they come; the last chunk may be cut by `max_tokens`.

    Rows that have ended yield end ids. The generator returns the `Generated` of the whole (`result = yield from stream(...)`).
    Arguments are checked when the first chunk is asked for.
    """
    chosen = GenerationSettings(**settings)
    job = _plan(predictor, prompts, keys, chosen)
    progress = steps.prefill(job.model, job.chunks, job.starts, job.history, job.capacity)
    return (yield from follow(job.recipe, job.weights, keys, progress, chosen.max_tokens))


def follow(
    recipe: Recipe, weights: Weights, keys: Array, progress: Progress, max_tokens: int
) -> Generator[Int[np.ndarray, "B K"], None, Generated]:
    """`stream` after a prompt that was read; `progress` is given up."""
    chunk_size, end_id = progress.chunk.shape[1], int(weights.end_id)
    chunks: list[np.ndarray] = []
    for step in range(-(-max_tokens // chunk_size)):
        progress, chunk = steps.step(recipe, weights, keys, progress)
        _require_chunks(recipe, progress)
        chunks.append(np.asarray(chunk)[:, : max_tokens - step * chunk_size])
        yield chunks[-1]
        if np.asarray(progress.ended).all():
            break
    tokens = np.concatenate(chunks, axis=1)
    missing = ((0, 0), (0, max_tokens - tokens.shape[1]))
    return _report(progress, np.pad(tokens, missing, constant_values=end_id), recipe.decoding)


class _Job(NamedTuple):
    recipe: Recipe
    model: Model
    weights: Weights
    chunks: Int[Array, "B N K"]
    starts: Int[Array, "B"]
    history: Int[Array, "B T"]
    capacity: int
    num_steps: int


def _plan(
    predictor: Predictor, prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]], keys: Array, settings: GenerationSettings
) -> _Job:
    """Checks the arguments and lays the prompts out."""
    chunk_size, vocab_size = predictor.chunk_size, predictor.vocab_size
    special, max_tokens, context = settings.special, settings.max_tokens, settings.context
    arrays = checked_prompts(prompts, vocab_size)
    check_options(len(prompts), keys, max_tokens, settings.decoding)
    num_steps = -(-max_tokens // chunk_size)
    for row, ids in enumerate(arrays):
        length = len(chunk_prompt(ids, chunk_size, special.begin_id))
        if context is not None and length > context:
            raise UsageError(f"prompt {row} has {length} chunks of {chunk_size} tokens, more than the context of {context}")
        if context is not None and length + num_steps > context:
            room = max(0, context - length) * chunk_size
            raise UsageError(
                f"prompt {row} has {length} chunks of {chunk_size} tokens and leaves room for {room} more tokens in the "
                f"context of {context} chunks: max_tokens={max_tokens} is too many"
            )

    chunks, starts = laid_out(arrays, chunk_size, special.begin_id)
    capacity = chunks.shape[1] + rounded(num_steps) - 1
    model = Model(*nnx.split(predictor))
    return _Job(
        recipe=Recipe(sampler=settings.sampler, decoding=settings.decoding),
        model=model,
        weights=steps.prepare(model, jnp.asarray(allowed_ids(vocab_size, special, settings.banned)), jnp.int32(special.end_id)),
        chunks=jnp.asarray(chunks, jnp.int32),
        starts=jnp.asarray(starts, jnp.int32),
        history=history_of(chunks, special.begin_id, capacity),
        capacity=capacity,
        num_steps=num_steps,
    )


def checked_prompts(prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]], vocab_size: int) -> list[Int[np.ndarray, "_"]]:
    """The prompts as arrays of ids that the model knows."""
    if not prompts:
        raise UsageError("no prompts: give at least one; an empty one is unconditional")
    arrays = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    for row, ids in enumerate(arrays):
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise UsageError(f"prompt {row}: token id {wrong} is outside the vocabulary of {vocab_size}")
    return arrays


def check_options(rows: int, keys: Array, max_tokens: int, decoding: str) -> None:
    """Raises UsageError for options that do not fit `rows` prompts."""
    if max_tokens < 1:
        raise UsageError(f"max_tokens must be at least 1, got {max_tokens}")
    if keys.shape[0] != rows:
        raise UsageError(f"{keys.shape[0]} keys for {rows} prompts: give one key a row (calm.rng.row_keys)")
    if decoding not in DECODINGS:
        raise UsageError(f"unknown decoding {decoding!r}; choose {' or '.join(DECODINGS)}")


def laid_out(
    prompts: list[Int[np.ndarray, "_"]], chunk_size: int, begin_id: int
) -> tuple[Int[np.ndarray, "B N K"], Int[np.ndarray, "B"]]:
    """Prompts as chunks, padded on the left to a length that is a multiple of LENGTH_STEP, and where each row begins."""
    chunks, starts = pad_prompts(prompts, chunk_size, begin_id)
    extra = rounded(chunks.shape[1]) - chunks.shape[1]
    return np.pad(chunks, ((0, 0), (extra, 0), (0, 0)), constant_values=begin_id), starts + extra


def history_of(chunks: Int[np.ndarray, "B N K"], begin_id: int, capacity: int) -> Int[Array, "B T"]:
    """`Progress.history` after these chunks, in a state with room for `capacity` chunks."""
    known = np.where(chunks == begin_id, NOTHING, chunks).reshape(len(chunks), -1)
    room = (capacity + 1 - chunks.shape[1]) * chunks.shape[2]
    return jnp.asarray(np.pad(known, ((0, 0), (room, 0)), constant_values=NOTHING), jnp.int32)


def allowed_ids(vocab_size: int, special: HasSpecialIds, banned: Sequence[int]) -> Int[np.ndarray, "_"]:
    """The ids that may be written, ascending."""
    for token in banned:
        if not 0 <= token < vocab_size:
            raise UsageError(f"banned token id {token} is outside the vocabulary of {vocab_size}")
    allowed = np.setdiff1d(np.arange(vocab_size, dtype=np.int32), [special.begin_id, special.mask_id, *banned])
    if not np.setdiff1d(allowed, [special.end_id]).size:
        raise UsageError(f"banned: {len(set(banned))} of {vocab_size} ids leave nothing to write")
    return allowed


def _require_chunks(recipe: Recipe, progress: Progress) -> None:
    """Raises OutOfDraws if a row's sampler found no chunk."""
    sampler = recipe.sampler
    if not isinstance(sampler, ExactTemperature) or not np.asarray(progress.ran_out).any():
        return
    row = int(np.argmax(progress.ran_out))
    place = f"prompt {row}, chunk {int(progress.step) - 1} of its continuation"
    raise sampler.out_of_draws(place, int(progress.last_draws[row]), float(progress.collision_rate[row]))


def rounded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def _report(progress: Progress, tokens: np.ndarray, decoding: str) -> Generated:
    fields = (progress.steps, progress.fallbacks, progress.draws, progress.lengths, progress.ended)
    made, fallbacks, draws, lengths, ended = jax.device_get(fields)
    limit = tokens.shape[1]
    return Generated(
        tokens=tokens,
        lengths=np.minimum(lengths, limit),
        ended=ended & (lengths < limit),
        fallback_share=fallbacks / np.maximum(made, 1),
        draws=draws,
        decoding=decoding,
    )
