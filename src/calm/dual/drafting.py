"""Drafting: CALM proposes the tokens of a chunk, and a token model writes its own text in fewer passes.

    drafted = draft(token_lm, NextVector(autoencoder, lm), prompts, keys, special=tokenizer, max_tokens=128)

The text has exactly the token model's distribution, whatever the drafts; with the rule "match" it is, token for token, the
text of `generate` with the same keys and sampler. The algorithm is in `calm.dual.speculation`.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from calm.core import steps
from calm.core.generate import HasSpecialIds, allowed_ids, check_options, checked_prompts, rounded
from calm.core.latent_lm import LatentLMConfig
from calm.core.predictor import NextVector, Predictor
from calm.core.steps import Model
from calm.dual.speculation import Drafting, Layout, Models, Plan, Prompts, run
from calm.errors import UsageError
from calm.token.model import TokenLM
from calm.token.sampler import SoftmaxSampler

PLAIN = SoftmaxSampler()


class Drafted(NamedTuple):
    """Continuations, and the work they took."""

    tokens: Int[np.ndarray, "B T"]
    """the prompt not included; after a row's end, end ids"""
    lengths: Int[np.ndarray, "B"]
    """tokens of each row before its end token, or before the limit"""
    ended: Bool[np.ndarray, "B"]
    """rows that wrote an end token; the others were cut at the limit"""
    work: "Work"
    """in all rows"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Work done for some rows (`calm.dual.speculation.Counts`)."""

    tokens: int
    """decided, including the end token and those that the last pass writes beyond the limit"""
    passes: int
    """of the token model, each over K + 1 positions"""
    proposed: int
    accepted: int
    chunks: int
    """chunks that CALM read, without those of the prompts"""
    plans: int
    """times at which latents were drawn"""
    places: int
    """positions at which the decoder was evaluated"""

    @property
    def tokens_per_pass(self) -> float:
        """Tokens per pass of the token model; 1 without drafts, at most K + 1."""
        return self.tokens / self.passes

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that were kept; drafts after a rejected one count as not kept."""
        return self.accepted / self.proposed

    def to_dict(self) -> dict[str, int | float]:
        return {**dataclasses.asdict(self), "tokens_per_pass": self.tokens_per_pass, "acceptance": self.acceptance}


def total_work(works: Sequence[Work]) -> Work:
    """Sum over several calls."""
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
    sampler: SoftmaxSampler = PLAIN,
    context: int | None = None,
    banned: Sequence[int] = (),
) -> Drafted:
    """Continues B prompts by up to `max_tokens` tokens of the token model `target`, drafted by `proposer`.

    Args:
        keys: one random key for each row, as of `calm.core.generate`.
        sampler: temperature and filters of the token model, which shape the drafts' distribution as well; `top_k=1` takes
            the most probable token.
        context: most tokens of a prompt and its continuation; None = no limit.
        banned: token ids that are never written.

    Raises:
        UsageError: models that do not share a vocabulary, prompts that do not fit, a proposer that is not a next-vector model.
    """
    target, proposer = checked_models(target, proposer)
    layout, rows = lay_out(proposer, prompts, keys, special, max_tokens, context)
    every = jnp.arange(target.vocab_size, dtype=jnp.int32)
    models = combined(target, proposer, special, banned, every)
    plan = Plan(drafting or Drafting(), sampler, layout)
    tokens, lengths, ended, counts = jax.device_get(run(plan, models, rows, jnp.int32(max_tokens)))
    tokens = tokens[:, :max_tokens]
    tokens = np.where(np.arange(max_tokens) < lengths[:, None], tokens, special.end_id)
    totals = {name: int(np.sum(value)) for name, value in counts._asdict().items()}
    return Drafted(
        tokens=tokens,
        lengths=np.minimum(lengths, max_tokens),
        ended=ended & (lengths < max_tokens),
        work=Work(tokens=totals["accepted"] + totals["passes"], **totals),
    )


def lay_out(
    proposer: NextVector,
    prompts: Sequence[Int[np.ndarray, "_"] | Sequence[int]],
    keys: Array,
    special: HasSpecialIds,
    max_tokens: int,
    context: int | None,
) -> tuple[Layout, Prompts]:
    """Prompts after begin ids, right-aligned, with room for their continuations. Raises UsageError for what does not fit."""
    rows, size = checked_prompts(prompts, proposer.vocab_size), proposer.chunk_size
    check_options(len(rows), keys, max_tokens, "drawn")
    for number, ids in enumerate(rows):
        if context is not None and len(ids) + max_tokens > context:
            room = max(0, context - len(ids))
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens and leaves room for {room} more in the context of {context}: "
                f"max_tokens={max_tokens} is too many"
            )
    longest = rounded(max(1, *map(len, rows)))
    prompt_chunks = longest // size + 1
    start = (prompt_chunks + 1) * size + proposer.reach
    layout = Layout(start, prompt_chunks, rounded(max_tokens) + 2 * size + 1)
    texts = np.full((len(rows), start + layout.capacity), special.begin_id, np.int32)
    for text, row in zip(texts, rows, strict=True):
        text[start - len(row) : start] = row
    return layout, Prompts(keys, jnp.asarray(texts), jnp.asarray([len(row) for row in rows], jnp.int32))


def combined(
    target: TokenLM, proposer: NextVector, special: HasSpecialIds, banned: Sequence[int], proposed: Int[Array, "_"] | None
) -> Models:
    """Both models for a compiled loop; the proposer scores the ids `proposed`, None = all that may be written."""
    allowed = allowed_ids(target.vocab_size, special, banned)
    mask = np.full(target.vocab_size, -np.inf, np.float32)
    mask[allowed] = 0.0
    every, end = jnp.arange(target.vocab_size, dtype=jnp.int32), jnp.int32(special.end_id)
    first, second = Model(*nnx.split(target)), Model(*nnx.split(proposer))
    ids = jnp.asarray(allowed, jnp.int32) if proposed is None else proposed
    return Models(first, second, steps.prepare(first, every, end), steps.prepare(second, ids, end), jnp.asarray(mask))


def checked_models(target: Predictor, proposer: Predictor) -> tuple[TokenLM, NextVector]:
    """Both models. Raises UsageError where the second cannot draft for the first."""
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
    """Forward FLOPs per generated token, prompts included."""

    target: float
    """passes of the token model"""
    proposer: float
    """reading chunks, also again at moved boundaries, and drawing latents"""
    drafts: float
    """evaluating the decoder"""

    @property
    def total(self) -> float:
        return self.target + self.proposer + self.drafts

    def to_dict(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "total": self.total}


def drafting_cost(
    target: TokenLM, proposer: NextVector, work: Work, drafting: Drafting, *, prompt_tokens: int, context: int
) -> Cost:
    """Cost of drafting that took `work`.

    Positions count at a full context of `context` tokens (`calm.evaluate.flops`), including those whose result a pass does
    not use; a prompt counts for every phase that reads it, without logits.
    """
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


def token_model_cost(target: TokenLM, *, prompt_tokens: int, tokens: int, context: int) -> float:
    """Forward FLOPs per generated token of the token model alone, prompt included."""
    position, logits = target.config.flops(context), 2 * target.config.width * target.config.vocab_size
    return position + prompt_tokens * (position - logits) / tokens


def _decoder_flops(lm: LatentLMConfig, proposer: NextVector, latents: int) -> tuple[float, float]:
    """FLOPs of the decoder for all latents: shared by the positions of a chunk, and of one position."""
    if lm.context_decoder is None:
        codec = proposer.autoencoder.config
        return float(latents * codec.decoder_flops()), latents * codec.vocabulary_flops() / lm.chunk_size
    writer = lm.context_decoder
    count = latents if writer.reads_latent else 1
    sizes = (lm.backbone.dim, lm.latent_dim)
    shared = writer.flops(*sizes, 0, lm.vocab_size, count)
    return float(shared), float(writer.flops(*sizes, 1, lm.vocab_size, count) - shared)
