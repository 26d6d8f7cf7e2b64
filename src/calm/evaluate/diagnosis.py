"""Where a next-vector model goes wrong: the path from text to text in six stages, each judged by numbers; the first that fails.

    codec round trip   text -> latent -> the same text?
    head mean          does the mean of the samples move with the text before?
    one sample         is a single draw a better prediction than the marginal?
    voted sample       is what most draws agree on at least as good as one draw?
    prompt alignment   does a prompt that is no multiple of K, filled with begin ids, cost anything?
    free running       does text that the model goes on writing stay like text?

A stage can only work if those before it do, so a model is mended from the top: what comes after the first failure says little.
The first three are the probe that users of CALM (arXiv:2510.27688) came up with for small models; the thresholds are ours, and
each judgement prints the one it used.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from calm.core.brier_lm import TextProtocol
from calm.core.intervals import Interval
from calm.evaluate.tables import interval_text, table

CODEC_TOKENS = 0.99  # below it a chunk of 4 is wrong one time in 25, however good the language model
HEAD_MEAN_SHARE = 0.01  # of the variance of latents; a head that has learned the marginal alone explains none of it
ALIGNMENT_LOSS = 0.25  # of Brier-1: more than text that differs in its first chunk could cost
STATE_DIFFERENCE = 0.05  # of the hidden state's norm; rounding gives .001 in float32 and about .02 in bfloat16
DRIFT_NATS = 1.0  # per token under a bigram: a factor of e in how unlikely the text is
REPEATED_CHUNKS = 0.2  # share of chunks, beyond what real text has
EARLY_ENDS = 0.5  # share of continuations


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

    @property
    def first_failure(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.failed), None)

    @property
    def verdict(self) -> str:
        """In words, what to mend first."""
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
        }

    def table(self) -> str:
        """Stage by stage, then the verdict, then what counts as a failure."""
        words = {True: "FAILS", False: "ok", None: "-"}
        rows = [[stage.name, words[stage.failed]] for stage in self.stages]
        lines = table(["stage", "result"], rows).split("\n")
        findings = ["finding", "-" * 7, *[stage.finding for stage in self.stages]]
        lines = [f"{line.ljust(len(lines[1]))}  {finding}" for line, finding in zip(lines, findings, strict=True)]
        thresholds = [f"{stage.name} fails where {stage.threshold}" for stage in self.stages]
        return "\n".join([*lines, "", self.verdict, "", *thresholds, self.protocol.line()])


REMEDIES = {
    "codec round trip": "No language model can mend it: train the autoencoder longer or wider (see calm inspect autoencoder)",
    "head mean": "The backbone has learned the marginal only: raise loss.auxiliary_weight, train longer, or use smaller chunks",
    "one sample": "The mean moves and single draws do not: more samples S in training, a larger head, or drawn decoding",
    "voted sample": "The model agrees with itself on something wrong: look for a collapsed head, or sample at a higher T",
    "prompt alignment": "Train with document starts behind begin ids, or give prompts whose length is a multiple of K",
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
    """Brier-1 after whole chunks of text, and what it loses where the first chunk holds so many tokens behind begin ids;
    with 0 it is the empty prompt's."""
    worst = max(losses, key=lambda rest: losses[rest].estimate)
    loss = losses[worst]
    moved = padding > STATE_DIFFERENCE
    failed = moved or (_low(loss) > 0 and loss.estimate > ALIGNMENT_LOSS * abs(plain))
    words = f"; padding a row changes its hidden state by {padding:.1%}" if moved else ""
    return Stage(
        name="prompt alignment",
        failed=failed,
        finding=f"Brier-1 {plain:.2f} after whole chunks; a first chunk of {worst} tokens behind begin ids costs "
        f"most, {interval_text(loss)}{words}",
        threshold=f"a filled first chunk costs more than {ALIGNMENT_LOSS:.0%} of Brier-1 in the chunks after it, or padding in "
        f"a batch moves a hidden state by more than {STATE_DIFFERENCE:.0%}",
        numbers={"whole_chunks": plain, "padding": padding, **{f"loss_{rest}": loss.estimate for rest, loss in losses.items()}},
    )


def judge_free_running(
    *, state: float, drift: float, repeated: float, repeated_in_text: float, early_ends: float, distinct: float
) -> Stage:
    """What changes when the model reads its own text instead of the true one.

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
        numbers={
            "state": state,
            "drift": drift,
            "repeated": repeated,
            "repeated_in_text": repeated_in_text,
            "early_ends": early_ends,
            "distinct_pairs": distinct,
        },
    )


def _low(interval: Interval) -> float:
    """The interval's lower end; the estimate where there was too little text for an interval."""
    return interval.estimate if math.isnan(interval.low) else interval.low


def _percent(interval: Interval) -> str:
    return f"{100 * interval.estimate:.2f} %"
