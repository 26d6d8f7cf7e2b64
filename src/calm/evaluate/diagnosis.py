"""Stages of a next-vector model from text to text, each judged by numbers; the first that fails is named.

    codec round trip   text -> latent -> the same text?
    head mean          does the mean of the samples move with the text before?
    vector use         does the decoder write something else under the vector of another text?
    one sample         is a single draw a better prediction than the marginal?
    voted sample       is what most draws agree on at least as good as one draw?
    prompt alignment   does a prompt that is no multiple of K, filled with begin ids, cost anything?
    free running       does text that the model writes after its own stay like text?

A stage can only work if those before it do, so the first failure is the one to repair. Round trip, head mean and one sample are
the probe of users of CALM (arXiv:2510.27688) for small models; thresholds are ours, and each judgement prints its own.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.brier_lm import TextProtocol, brier_argmax
from calm.core.chunk_decoder import Decoding, recent_tokens
from calm.core.generate import HasSpecialIds
from calm.core.intervals import Interval, bootstrap
from calm.core.predictor import sample_chunks
from calm.core.sampler import StepKeys
from calm.core.temperature import BatchTemperature
from calm.errors import UsageError
from calm.evaluate.blocks import checked, run_blocks, sums_of
from calm.evaluate.free_running import relative_difference, run_free
from calm.evaluate.ngram import Bigram, Unigram
from calm.evaluate.reconstruction import evaluate_autoencoder
from calm.evaluate.tables import interval_text, table
from calm.evaluate.vector_use import UNUSED, NoVectorUse, VectorUse
from calm.rng import PRNGKey, row_keys, stream

CODEC_TOKENS = 0.99  # below it a chunk of 4 is wrong one time in 25, however good the language model
HEAD_MEAN_SHARE = 0.01  # of the variance of latents; a head that has learned the marginal alone explains none of it
ALIGNMENT_LOSS = 0.25  # of Brier-1: more than text that differs in its first chunk could cost
STATE_DIFFERENCE = 0.05  # of the hidden state's norm; rounding gives .001 in float32 and about .02 in bfloat16
DRIFT_NATS = 1.0  # per token under a bigram: a factor of e in how unlikely the text is
REPEATED_CHUNKS = 0.2  # share of chunks, beyond what real text has
EARLY_ENDS = 0.5  # share of continuations
ALIGNED_CHUNKS = 16  # chunks after the first on which alignment is scored: short prompts are what it is about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One judgement. `failed` None: the model has no such stage."""

    name: str
    failed: bool | None
    finding: str
    threshold: str
    numbers: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: value if math.isfinite(value) else None for name, value in self.numbers.items()}
        return {**dataclasses.asdict(self), "numbers": numbers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All stages in order."""

    name: str
    protocol: TextProtocol
    stages: tuple[Stage, ...]
    vector: VectorUse | NoVectorUse | None = None

    @property
    def first_failure(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.failed), None)

    @property
    def verdict(self) -> str:
        """One line that names the first failure and its remedy."""
        stage = self.first_failure
        if stage is None:
            return f"{self.name}: no stage fails"
        return f"{self.name}: the first stage that fails is {stage.name}: {stage.finding}. {REMEDIES[stage.name]}"

    def to_dict(self) -> dict[str, Any]:
        failure = self.first_failure
        return {
            "name": self.name,
            "protocol": self.protocol.to_dict(),
            "first_failure": failure.name if failure else None,
            "verdict": self.verdict,
            "stages": [stage.to_dict() for stage in self.stages],
            "vector": self.vector and self.vector.to_dict(),
        }

    def table(self) -> str:
        """Stage by stage, then the verdict, then what counts as a failure."""
        words = {True: "FAILS", False: "ok", None: "-"}
        rows = [[stage.name, words[stage.failed]] for stage in self.stages]
        lines = table(["stage", "result"], rows).split("\n")
        findings = ["finding", "-" * 7, *[stage.finding for stage in self.stages]]
        lines = [f"{line.ljust(len(lines[1]))}  {finding}" for line, finding in zip(lines, findings, strict=True)]
        thresholds = [f"{stage.name} fails where {stage.threshold}" for stage in self.stages]
        vector = [] if self.vector is None else ["", self.vector.table()]
        return "\n".join([*lines, "", self.verdict, "", *thresholds, self.protocol.line(), *vector])


REMEDIES = {
    "codec round trip": "No language model can repair it: train the autoencoder longer or wider (see calm inspect autoencoder)",
    "head mean": "The backbone has learned the marginal only: raise the auxiliary term, train longer, or use smaller chunks",
    "vector use": "The decoder does without its vector: give it less to read besides, or train the head for longer",
    "one sample": "The mean moves and single draws do not: more samples S in training, a larger head, or drawn decoding",
    "voted sample": "The model agrees with itself on something wrong: look for a collapsed head, or sample at a higher T",
    "prompt alignment": "Train with document starts after begin ids, or give prompts whose length is a multiple of K",
    "free running": "It predicts well after true text and is led astray by its own: train longer, or sample at T < 1",
}


def judge_codec(tokens: Interval, chunks: Interval, sampled: Interval) -> Stage:
    """Accuracies of decoding the posterior's mean, and of a draw of the posterior."""
    return Stage(
        name="codec round trip",
        failed=tokens.estimate < CODEC_TOKENS,
        finding=f"{_percent(tokens)} of tokens and {_percent(chunks)} of chunks come back ({_percent(sampled)} of tokens from "
        "a draw of the posterior)",
        threshold=f"fewer than {CODEC_TOKENS:.0%} of held-out tokens come back",
        numbers={"tokens": tokens.estimate, "chunks": chunks.estimate, "tokens_from_a_draw": sampled.estimate},
    )


def judge_head_mean(explained: Interval | None, decoded: float, most_frequent: float) -> Stage:
    """The share of the next latent's variance that the mean of the head's samples explains, and what that mean decodes to."""
    threshold = f"the mean of the samples explains less than {HEAD_MEAN_SHARE:.0%} of the variance of the next latent"
    if explained is None:
        finding = "this model writes from its hidden state alone; its head takes no part"
        return Stage(name="head mean", failed=None, finding=finding, threshold=threshold, numbers={})
    return Stage(
        name="head mean",
        failed=explained.estimate < HEAD_MEAN_SHARE or _low(explained) < 0,
        finding=f"the mean of the samples explains {_percent(explained)} of the next latent's variance; decoded, {decoded:.1%} "
        f"of its tokens are right (the most frequent token: {most_frequent:.1%})",
        threshold=threshold,
        numbers={"explained": explained.estimate, "tokens_right": decoded, "most_frequent_token": most_frequent},
    )


def judge_vector(vector: VectorUse | NoVectorUse) -> Stage:
    """By the nats that the vector of another text costs (`calm.evaluate.vector_use`)."""
    return Stage(
        name="vector use",
        failed=None if isinstance(vector, NoVectorUse) else vector.verdict == "unused",
        finding=vector.finding,
        threshold=f"the vector of another text costs less than {UNUSED} nats a token",
        numbers=vector.scalars(),
    )


def judge_one_sample(brier: Interval, above_unigram: Interval, hits: float, collisions: float) -> Stage:
    """Brier-1 of the model's samples, and its difference to the unigram's on the same positions; both times 100."""
    collapsed = collisions > 0.99
    words = "; all samples are the same chunk: the head has collapsed" if collapsed else ""
    return Stage(
        name="one sample",
        failed=not _low(above_unigram) > 0,
        finding=f"Brier-1 {interval_text(brier)} from true prefixes, {interval_text(above_unigram)} above the unigram; the "
        f"first token of a sample is right {hits:.1%} of the time{words}",
        threshold="Brier-1 from true prefixes is not above the unigram's (95 % interval of the difference)",
        numbers={"brier_1": brier.estimate, "above_unigram": above_unigram.estimate, "right": hits, "equal_pairs": collisions},
    )


def judge_voted(gain: Interval, voted: float, fallback: float, candidates: int) -> Stage:
    """Share of right tokens in the chunk that votes choose, minus that of one sample."""
    weak = f"; at {fallback:.0%} of the positions no two of {candidates} draws agree" if fallback > 0.5 else ""
    return Stage(
        name="voted sample",
        failed=(gain.estimate if math.isnan(gain.high) else gain.high) < 0,
        finding=f"T = 1/2 by {candidates} votes gets {voted:.1%} of tokens right, {100 * gain.estimate:+.2f} points against "
        f"one sample{weak}",
        threshold="the voted chunk has fewer right tokens than one sample (95 % interval of the difference)",
        numbers={"tokens_right": voted, "gain": gain.estimate, "fallback_share": fallback},
    )


def judge_alignment(plain: float, losses: Mapping[int, Interval], padding: float) -> Stage:
    """Brier-1 after whole chunks of text, and what it loses where the first chunk holds so many tokens after begin ids;
    with 0 it is the empty prompt's."""
    worst = max(losses, key=lambda rest: losses[rest].estimate)
    loss = losses[worst]
    moved = padding > STATE_DIFFERENCE
    failed = moved or (_low(loss) > 0 and loss.estimate > ALIGNMENT_LOSS * abs(plain))
    words = f"; padding a row changes its hidden state by {padding:.1%}" if moved else ""
    return Stage(
        name="prompt alignment",
        failed=failed,
        finding=f"Brier-1 {plain:.2f} after whole chunks; a first chunk of {worst} tokens after begin ids costs "
        f"most, {interval_text(loss)}{words}",
        threshold=f"a filled first chunk costs more than {ALIGNMENT_LOSS:.0%} of Brier-1 in the chunks after it, or padding in "
        f"a batch moves a hidden state by more than {STATE_DIFFERENCE:.0%}",
        numbers={"whole_chunks": plain, "padding": padding, **{f"loss_{rest}": loss.estimate for rest, loss in losses.items()}},
    )


def judge_free_running(
    *, state: float, drift: float, repeated: float, repeated_in_text: float, early_ends: float, distinct: float
) -> Stage:
    """Compares the model on its own text with the model on the true text.

    `state`: relative difference of hidden states read chunk by chunk and at once. `drift`: nats per token under a bigram, of
    what it writes alone minus what it writes after true text.
    """
    wrong = []
    if state > STATE_DIFFERENCE:
        wrong.append(f"read chunk by chunk, its hidden state differs by {state:.1%}")
    if drift > DRIFT_NATS:
        wrong.append(f"its text is {drift:.2f} nats a token less likely than after true text")
    if repeated > repeated_in_text + REPEATED_CHUNKS:
        wrong.append(f"{repeated:.0%} of its chunks repeat the one before")
    if early_ends > EARLY_ENDS:
        wrong.append(f"{early_ends:.0%} of the continuations end in their first quarter")
    fine = (
        f"its own text is {drift:+.2f} nats a token under a bigram against what it writes after true text, {repeated:.1%} of "
        f"chunks repeat the one before ({repeated_in_text:.1%} in real text), {distinct:.0%} of token pairs are distinct"
    )
    return Stage(
        name="free running",
        failed=bool(wrong),
        finding="; ".join(wrong) or fine,
        threshold=f"hidden states differ by more than {STATE_DIFFERENCE:.0%}, or its text is more than {DRIFT_NATS:g} nat a "
        f"token less likely, or {REPEATED_CHUNKS:.0%} more chunks repeat than in text, or half the continuations end early",
        numbers=dict(
            state=state,
            drift=drift,
            repeated=repeated,
            repeated_in_text=repeated_in_text,
            early_ends=early_ends,
            distinct_pairs=distinct,
        ),
    )


def _low(interval: Interval) -> float:
    """The interval's lower end; the estimate where there was too little text for an interval."""
    return interval.estimate if math.isnan(interval.low) else interval.low


def _percent(interval: Interval) -> str:
    return f"{100 * interval.estimate:.2f} %"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiagnoseOptions:
    """Numbers of draws, and how tokens are chosen."""

    num_samples: int = 8
    candidates: int = 100
    """draws that vote at T = 1/2"""
    decoding: Decoding = "argmax"

    def __post_init__(self) -> None:
        if self.num_samples < 2 or self.candidates < 2:
            raise UsageError("diagnose: num_samples and candidates must be at least 2")


def diagnose(
    predictor: Any,
    blocks: Int[np.ndarray, "R T"],
    document: Int[np.ndarray, "*r"],
    key: PRNGKey,
    *,
    special: HasSpecialIds,
    unigram: Unigram,
    bigram: Bigram,
    options: DiagnoseOptions | None = None,
    vector: VectorUse | NoVectorUse | None = None,
    text: TextProtocol | None = None,
    name: str = "CALM",
) -> Diagnosis:
    """Judges the stages of a next-vector model (`calm.core.predictor.NextVector`) on held-out blocks.

    Args:
        blocks, document: token blocks, and the document that each begins in. special: the tokenizer.
        unigram, bigram: fitted on the training text: the least that a sample must beat, and the judge of free-running text.
        vector: how far the decoder uses its vector; without it that stage is left out.

    Raises:
        UsageError: blocks that do not fit, or too few of them for an interval.
    """
    options = options or DiagnoseOptions()
    text = checked(blocks, document, predictor.chunk_size, text)
    if blocks.shape[1] < 4 * predictor.chunk_size or len(blocks) < 2:
        raise UsageError(f"diagnose needs at least 2 blocks of 4 chunks, got {len(blocks)} of {blocks.shape[1]} tokens")
    codec = evaluate_autoencoder(predictor.autoencoder, blocks, document, stream(key, "codec"), noise=(), text=text)
    head_mean, *samples = _true_prefixes(predictor, blocks, document, stream(key, "prefixes"), unigram, options)
    free = stream(key, "free")
    running = run_free(predictor, blocks, free, special=special, bigram=bigram, decoding=options.decoding)
    stages = (
        judge_codec(codec.token_accuracy, codec.chunk_accuracy, codec.sampled.tokens),
        head_mean,
        *([] if vector is None else [judge_vector(vector)]),
        *samples,
        _alignment(predictor, blocks, document, stream(key, "alignment"), special, options),
        judge_free_running(**running._asdict()),
    )
    return Diagnosis(name=name, protocol=text, stages=stages, vector=vector)


@partial(jax.jit, static_argnames=("graph", "options", "has_latents"))
def _score_prefixes(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    rows: Int[Array, "B"],
    key: PRNGKey,
    center: Float[Array, "Z"],
    unigram: Float[Array, "V"],
    *,
    options: DiagnoseOptions,
    has_latents: bool,
) -> Float[Array, "B 10"]:
    predictor: Any = nnx.merge(graph, params)
    chunks = tokens.reshape(len(tokens), -1, predictor.chunk_size)
    targets = chunks[:, 1:]
    hidden, _ = predictor.hidden(chunks[:, :-1])
    previous = recent_tokens(chunks[:, :-1], predictor.reach)
    count = options.num_samples

    def block(row: Array, hidden: Array, previous: Array, targets: Array) -> Float[Array, "10"]:
        of_row = jax.random.fold_in(key, row)
        residual, total, right_mean = jnp.zeros(()), jnp.ones(()), jnp.zeros(())
        if has_latents:
            latents = predictor.lm.head(hidden, predictor.draw_noise(stream(of_row, "mean"), (count, len(hidden))).latent)
            truth, mean = predictor.autoencoder.encode(targets).mean, latents.mean(0)
            # The squared distance of the mean of S samples has the samples' variance / S in it; that is taken out again.
            noise = jnp.square(latents - mean).sum((0, -1)) / (count * (count - 1))
            residual = (jnp.square(mean - truth).sum(-1) - noise).sum()
            total = jnp.square(truth - center).sum()
            right_mean = (predictor.autoencoder.decode(mean) == targets).sum()
        samples = sample_chunks(
            predictor, stream(of_row, "one"), hidden, previous, options.candidates, decoding=options.decoding
        )
        few = samples[:count]
        brier = brier_argmax(few, targets)[..., 0].sum()
        first = targets[..., 0]
        baseline = (2 * unigram[first] - jnp.square(unigram).sum()).sum()
        hits = (few[..., 0] == first).mean(0).sum()
        equal = (few[1:] == few[:-1]).all(-1).mean(0).sum()
        keys = row_keys(stream(of_row, "vote"), len(hidden))
        choice = BatchTemperature(num_candidates=options.candidates).sample(StepKeys(keys, keys), _Drawn(samples))
        voted, one = (choice.chunk == targets).sum(), (few == targets).mean(0).sum()
        fallback = choice.fell_back.sum()
        return jnp.stack([residual, total, right_mean, brier, baseline, hits, equal, voted, one, fallback]).astype(jnp.float32)

    return jax.lax.map(lambda each: block(*each), (rows, hidden, previous, targets))


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """Chunks that were drawn already, as what a sampler draws from."""

    chunks: Int[Array, "S B K"]

    @property
    def alive(self) -> Bool[Array, "B"]:
        return jnp.ones(self.chunks.shape[1], bool)

    def draw(self, keys: Array, num_draws: int) -> Int[Array, "S B K"]:
        return self.chunks[:num_draws]

    def repeats(self, chunks: Int[Array, "S B K"], length: int) -> Bool[Array, "S B"]:
        return jnp.zeros(chunks.shape[:2], bool)


@partial(jax.jit, static_argnames=("graph",))
def _mean_latent(graph: Any, params: Any, tokens: Int[Array, "B T"], rows: Int[Array, "B"]) -> Float[Array, "B Z"]:
    predictor: Any = nnx.merge(graph, params)
    return predictor.autoencoder.encode(tokens.reshape(len(tokens), -1, predictor.chunk_size)[:, 1:]).mean.mean(1)


def _true_prefixes(
    predictor: Any, blocks: np.ndarray, document: np.ndarray, key: PRNGKey, unigram: Unigram, options: DiagnoseOptions
) -> tuple[Stage, Stage, Stage]:
    """Head mean, one sample and voted sample: everything that is asked at true prefixes, in one pass."""
    graph, params = nnx.split(predictor)
    writer = getattr(predictor.lm, "context_decoder", None)
    has_latents = writer is None or writer.reads_latent
    center = run_blocks(partial(_mean_latent, graph, params), blocks, None)[0].mean(0)
    score = partial(_score_prefixes, graph, params, options=options, has_latents=has_latents)
    probability = jnp.asarray(unigram.probability, jnp.float32)
    totals, _ = run_blocks(lambda tokens, rows: score(tokens, rows, key, center, probability), blocks, None)
    positions, chunk_size = blocks.shape[1] // predictor.chunk_size - 1, predictor.chunk_size
    sums = sums_of(totals, positions, document, blocks.shape[1])
    means, points = sums.means, 1 / chunk_size
    explained, brier, above, gain = bootstrap(
        sums,
        [
            lambda m: 1 - m[..., 0] / m[..., 1],
            lambda m: 100 * m[..., 3],
            lambda m: 100 * (m[..., 3] - m[..., 4]),
            lambda m: (m[..., 7] - m[..., 8]) * points,
        ],
    )
    most_frequent = float(np.mean(blocks[:, chunk_size:] == int(np.argmax(unigram.probability))))
    return (
        judge_head_mean(explained if has_latents else None, float(means[2]) * points, most_frequent),
        judge_one_sample(brier, above, float(means[5]), float(means[6])),
        judge_voted(gain, float(means[7]) * points, float(means[9]), options.candidates),
    )


@partial(jax.jit, static_argnames=("graph", "num_samples", "decoding"))
def _score_aligned(
    graph: Any,
    params: Any,
    tokens: Int[Array, "B T"],
    rows: Int[Array, "B"],
    key: PRNGKey,
    begin: Int[Array, ""],
    num_samples: int,
    decoding: str,
) -> Float[Array, "B X"]:
    """Brier-1 after a first chunk with 0 .. K-1 tokens after begin ids, and after the whole first chunk."""
    predictor: Any = nnx.merge(graph, params)
    size = predictor.chunk_size
    chunks = tokens.reshape(len(tokens), -1, size)[:, : ALIGNED_CHUNKS + 1]
    read, targets = chunks[:, :-1], chunks[:, 1:]

    def score(kept: Int[Array, ""]) -> Float[Array, "B"]:
        first = jnp.where(jnp.arange(size) < size - kept, begin, read[:, 0])
        filled = read.at[:, 0].set(first)
        hidden, _ = predictor.hidden(filled)
        keys = jax.vmap(partial(jax.random.fold_in, key))(rows)  # the same draws for every filling

        def draw(key: Array, hidden: Array, previous: Array) -> Int[Array, "S N K"]:
            return sample_chunks(predictor, key, hidden, previous, num_samples, decoding=decoding)

        samples = jax.vmap(draw, out_axes=1)(keys, hidden, recent_tokens(filled, predictor.reach))
        return brier_argmax(samples, targets)[..., 0].sum(1)

    return jax.lax.map(score, jnp.arange(size + 1)).T


def _alignment(
    predictor: Any, blocks: np.ndarray, document: np.ndarray, key: PRNGKey, special: HasSpecialIds, options: DiagnoseOptions
) -> Stage:
    graph, params = nnx.split(predictor)
    size = predictor.chunk_size
    score = partial(_score_aligned, graph, params, num_samples=options.num_samples, decoding=options.decoding)
    totals, _ = run_blocks(lambda tokens, rows: score(tokens, rows, key, jnp.int32(special.begin_id)), blocks, None)
    positions = min(ALIGNED_CHUNKS, blocks.shape[1] // size - 1)
    sums = sums_of(totals, positions, document, blocks.shape[1])
    losses = bootstrap(sums, [lambda means, rest=rest: 100 * (means[..., size] - means[..., rest]) for rest in range(size)])
    prefix = blocks[:2, : 4 * size].reshape(2, -1, size)
    padded = np.concatenate([np.full((2, 3, size), special.begin_id), prefix], axis=1)
    state = predictor.init_state(2, padded.shape[1], jnp.full((2,), 3, jnp.int32))
    alone = predictor.hidden(jnp.asarray(prefix, jnp.int32))[0]
    in_batch = predictor.hidden(jnp.asarray(padded, jnp.int32), state)[0][:, 3:]
    return judge_alignment(100 * float(sums.means[size]), dict(enumerate(losses)), relative_difference(in_batch, alone))
