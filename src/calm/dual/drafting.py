"""Drafting: a token model's text, written by fewer passes of it. CALM proposes the tokens of a chunk, and nothing is lost.

    drafted = draft(token_lm, NextVector(autoencoder, lm), prompts, keys, special=tokenizer, max_tokens=128)

The text follows the token model's law exactly, whatever the drafts are worth; with the rule "match" it is, token for token,
what `generate` writes with the same keys and sampler. How the pieces work together: `calm.dual.speculation`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core import steps
from calm.core.generate import LENGTH_STEP, HasSpecialIds
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector, Predictor
from calm.core.steps import Model
from calm.dual.speculation import Drafting, Layout, run
from calm.errors import UsageError
from calm.token.model import TokenLM
from calm.token.sampler import SoftmaxSampler

PLAIN = SoftmaxSampler()


class Drafted(NamedTuple):
    """Continuations, and what they took."""

    tokens: Int[np.ndarray, "B T"]
    """the prompt not included; after a row's end, end ids"""
    lengths: Int[np.ndarray, "B"]
    """tokens of each row before its end token, or before the limit"""
    ended: Bool[np.ndarray, "B"]
    """rows that wrote an end token; the others were cut at the limit"""
    work: "Work"
    """of all rows"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What was done for some rows of text (`calm.dual.speculation.Counts`)."""

    tokens: int
    """decided, the end token and what a last pass writes behind the limit included"""
    passes: int
    """of the token model, each over K + 1 positions"""
    proposed: int
    accepted: int
    chunks: int
    """chunks that CALM read to go on"""
    plans: int
    """times at which latents were drawn"""
    places: int
    """places at which the decoder's law was asked for"""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens for each pass of the token model; 1 without drafts, K + 1 at most."""
        return self.tokens / self.passes

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that was kept. Drafts behind a rejected one count as not kept."""
        return self.accepted / self.proposed

    def to_dict(self) -> dict[str, int | float]:
        return {**dataclasses.asdict(self), "tokens_per_pass": self.tokens_per_pass, "acceptance": self.acceptance}


def sum_of(works: Sequence[Work]) -> Work:
    """What was done in all."""
    return Work(**{field.name: sum(getattr(work, field.name) for work in works) for field in dataclasses.fields(Work)})


def draft(
    target: Predictor,
    proposer: Predictor,
    prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]],
    keys: Array,
    *,
    special: HasSpecialIds,
    max_tokens: int,
    drafting: Drafting | None = None,
    law: SoftmaxSampler = PLAIN,
    context: int | None = None,
    banned: Sequence[int] = (),
) -> Drafted:
    """Continues B prompts by up to `max_tokens` tokens of the token model `target`, which CALM drafts.

    `law` is how the token model is sampled: temperature and filters, `top_k=1` for the most probable token. The drafts' law is
    shaped by the same rules. `keys`, `special` and `banned` are those of `generate`; `context` is the most tokens that a prompt
    and its continuation may have together, none = no limit.

    Raises:
        UsageError: models that do not share a vocabulary, prompts that do not fit, a proposer that is no next-vector model.
    """
    target, proposer = checked_models(target, proposer)
    laid = lay_out(proposer, prompts, keys, special, max_tokens, context)
    every = jnp.arange(target.vocab_size, dtype=jnp.int32)
    models = (Model(*nnx.split(target)), Model(*nnx.split(proposer)))
    weights = tuple(steps.prepare(model, every, jnp.int32(special.end_id)) for model in models)
    tokens, lengths, ended, counts = jax.device_get(
        run(
            drafting or Drafting(),
            law,
            laid.layout,
            models,
            weights,
            mask_of(target.vocab_size, special, banned),
            keys,
            laid.texts,
            laid.lengths,
            jnp.int32(max_tokens),
        )
    )
    tokens = tokens[:, :max_tokens]
    tokens = np.where(np.arange(max_tokens) < lengths[:, None], tokens, special.end_id)
    totals = {name: int(np.sum(value)) for name, value in counts._asdict().items()}
    return Drafted(
        tokens=tokens,
        lengths=np.minimum(lengths, max_tokens),
        ended=ended & (lengths < max_tokens),
        work=Work(tokens=totals["accepted"] + totals["passes"], **totals),
    )


class Laid(NamedTuple):
    """Prompts as a compiled loop takes them."""

    layout: Layout
    texts: Int[Array, "B T"]
    lengths: Int[Array, "B"]


def lay_out(
    proposer: NextVector,
    prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]],
    keys: Array,
    special: HasSpecialIds,
    max_tokens: int,
    context: int | None,
) -> Laid:
    """Prompts, right-aligned behind begin ids, with room for what is written. Raises UsageError for what does not fit."""
    vocab_size, size = proposer.vocab_size, proposer.chunk_size
    if not prompts:
        raise UsageError("no prompts: give at least one; an empty one is unconditional")
    if max_tokens < 1:
        raise UsageError(f"max_tokens must be at least 1, got {max_tokens}")
    if keys.shape[0] != len(prompts):
        raise UsageError(f"{keys.shape[0]} keys for {len(prompts)} prompts: give one key a row (calm.rng.row_keys)")
    rows = [np.asarray(prompt, np.int32).reshape(-1) for prompt in prompts]
    for number, ids in enumerate(rows):
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            wrong = ids[(ids < 0) | (ids >= vocab_size)][0]
            raise UsageError(f"prompt {number}: token id {wrong} is outside the vocabulary of {vocab_size}")
        if context is not None and len(ids) + max_tokens > context:
            room = max(0, context - len(ids))
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens and leaves room for {room} more in the context of {context}: "
                f"max_tokens={max_tokens} is too many"
            )

    longest = _rounded(max(len(row) for row in rows))
    prompt_chunks = longest // size + 1
    start = (prompt_chunks + 1) * size + proposer.reach
    layout = Layout(start, prompt_chunks, _rounded(max_tokens) + 2 * size + 1)
    texts = np.full((len(rows), start + layout.capacity), special.begin_id, np.int32)
    for text, row in zip(texts, rows, strict=True):
        text[start - len(row) : start] = row
    return Laid(layout, jnp.asarray(texts), jnp.asarray([len(row) for row in rows], jnp.int32))


def checked_models(target: Predictor, proposer: Predictor) -> tuple[TokenLM, NextVector]:
    """Both as they are. Raises UsageError where the second cannot draft for the first."""
    if not isinstance(target, TokenLM):
        raise UsageError("drafting: the model that checks must be a token model (calm train token-lm), this one has chunks")
    if not isinstance(proposer, NextVector):
        raise UsageError(
            "drafting: the model that drafts must be a next-vector model (calm train lm), this one is a token model"
        )
    if target.vocab_size != proposer.vocab_size:
        raise UsageError(
            f"drafting: the token model has a vocabulary of {target.vocab_size}, the one that drafts of {proposer.vocab_size}: "
            "both must be trained on one tokenizer"
        )
    return target, proposer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Forward FLOPs per token written, prompts included."""

    target: float
    """the token model's passes"""
    proposer: float
    """reading chunks, among them those read again at moved boundaries, and drawing latents"""
    drafts: float
    """the decoder's laws"""

    @property
    def total(self) -> float:
        return self.target + self.proposer + self.drafts

    def to_dict(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "total": self.total}


def cost(target: TokenLM, proposer: NextVector, work: Work, drafting: Drafting, *, prompt_tokens: int, context: int) -> Cost:
    """What some drafting took. Positions count at a full context of `context` tokens (`calm.evaluate.flops`); those that a pass
    reads for nothing count, and a prompt counts at every phase that reads it. The logits of prompts are not made."""
    lm, size, latents = proposer.lm.config, proposer.chunk_size, drafting.num_latents
    chunks = context // size
    phases = size if drafting.boundaries == "moved" else 1
    position = target.config.flops(context)
    logits = 2 * target.config.width * target.config.vocab_size
    encoder = proposer.autoencoder.config.encoder_flops() if lm.stem != "discrete" else 0
    reading = lm.flops(chunks, 0) + encoder
    plan, place = _decoder_flops(lm, proposer, latents)
    drawing = lm.flops(chunks, latents) - lm.flops(chunks, 0) if plan else 0
    return Cost(
        target=(work.passes * (size + 1) * position + prompt_tokens * (position - logits)) / work.tokens,
        proposer=((work.chunks + phases * prompt_tokens / size) * reading + work.plans * (drawing + plan)) / work.tokens,
        drafts=work.places * place / work.tokens,
    )


def alone(target: TokenLM, *, prompt_tokens: int, tokens: int, context: int) -> float:
    """FLOPs per token of the token model by itself, prompt included."""
    position, logits = target.config.flops(context), 2 * target.config.width * target.config.vocab_size
    return position + prompt_tokens * (position - logits) / tokens


def _decoder_flops(lm: LatentLMConfig, proposer: NextVector, latents: int) -> tuple[float, float]:
    """Of what the places of a chunk share, and of one place, for all latents."""
    if lm.context_decoder is None:
        codec = proposer.autoencoder.config
        return float(latents * codec.decoder_flops()), latents * codec.vocabulary_flops() / lm.chunk_size
    writer = lm.context_decoder
    count = latents if writer.use_latent else 1
    sizes = (lm.backbone.dim, lm.latent_dim)
    shared = writer.flops(*sizes, 0, lm.vocab_size, count)
    return float(shared), float(writer.flops(*sizes, 1, lm.vocab_size, count) - shared)


def mask_of(vocab_size: int, special: HasSpecialIds, banned: Sequence[int]) -> Float[Array, "V"]:
    """What is added to logits: minus infinity for what is never written."""
    for token in banned:
        if not 0 <= token < vocab_size:
            raise UsageError(f"banned token id {token} is outside the vocabulary of {vocab_size}")
    mask = np.zeros(vocab_size, np.float32)
    mask[[token for token in (special.begin_id, special.mask_id, *banned) if token < vocab_size]] = -np.inf
    if not np.isfinite(np.delete(mask, special.end_id) if special.end_id < vocab_size else mask).any():
        raise UsageError(f"banned: {len(set(banned))} of {vocab_size} ids leave nothing to write")
    return jnp.asarray(mask)


def _rounded(length: int) -> int:
    return -(-max(length, 1) // LENGTH_STEP) * LENGTH_STEP
