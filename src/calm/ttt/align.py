"""Alignment of a trained model to what is wanted, prompt by prompt, text in and text out (docs/ttt.md)."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from calm.core.autoencoder import Autoencoder
from calm.core.latent_lm import LatentLM
from calm.core.predictor import NextVector
from calm.errors import UsageError
from calm.evaluate.text_quality import Judge
from calm.rng import row_keys, stream
from calm.runs.bundle import Bundle
from calm.runs.stages import validation_blocks
from calm.runs.writing import as_judge
from calm.text.chunking import num_chunks
from calm.ttt.concept import (
    Reader,
    chunks_with,
    concept_of_texts,
    concept_of_words,
    encoded,
    expected,
    parse_words,
    require_found,
)
from calm.ttt.controls import directions, moved, random_changes
from calm.ttt.cost import AlignmentCost, alignment_cost
from calm.ttt.critic import ConceptCritic, ShuffledCritic, checked_rewards, reads_chunks, weighted
from calm.ttt.critic_files import load_critic
from calm.ttt.lexicon import LexiconCritic, topic_of
from calm.ttt.report import AlignmentReport, Way
from calm.ttt.rollout import require_steerable
from calm.ttt.seal import Acted, Prompts, Rewired, Seal, SealConfig
from calm.ttt.training import read_lines

CONCEPT_TOKENS, TOPIC_TOKENS, PASSAGE = 256 * 1024, 1024 * 1024, 128
By = Literal["auto", "text", "direction"]
CONTROLS = ("shuffled reward", "random direction", "best of S", "steering")


def topic_critic(
    model: Bundle, concept: str, data: str | Path | None = None, *, split: str = "train", max_tokens: int = TOPIC_TOKENS
) -> tuple[LexiconCritic, int]:
    """The critic of what a model's decoder expects to write about a concept (`calm.ttt.lexicon`), and the number of passages of
    `PASSAGE` tokens that it was learned from. The arguments are those of `concept_critic`.

    Raises:
        UsageError: as `concept_critic`; a decoder that reads more than latents.
    """
    predictor, tokenizer = require_steerable(model.predictor), model.tokenizer
    text = model.prepared_data(data).split(split)
    count = min(max_tokens, text.num_tokens) // PASSAGE
    passages = text.read(0, count * PASSAGE).reshape(count, PASSAGE)
    if concept.startswith("@"):
        examples = tokenizer.encode_batch(read_lines(concept[1:], "concept"))
        own, other, found = examples, passages, len(examples)
    else:
        words = parse_words(concept)
        about = chunks_with(words, passages, PASSAGE, tokenizer)[:, 0]
        own, other, found = passages[about], passages[~about], int(about.sum())
        require_found(found, words, passages.size)
    return LexiconCritic.of(predictor, topic_of(list(own), list(other), predictor.vocab_size)), found


def concept_critic(
    model: Bundle, concept: str, data: str | Path | None = None, *, split: str = "train", max_tokens: int = CONCEPT_TOKENS
) -> tuple[ConceptCritic, int]:
    """The critic of a concept, and the number of chunks that it was found in.

    `concept` is words with commas between them, which are looked for in the first `max_tokens` of a split of prepared data (by
    default what the model was trained on), or `@FILE`, a file or folder of example texts, one a line.

    Raises:
        UsageError: no words, words that the text does not have, or a file that cannot be read.
    """
    read, size = latent_reader(model), _autoencoder(model).config.chunk_size
    opened = model.prepared_data(data)
    blocks, _ = validation_blocks(opened, model.block_tokens, split, max_tokens)
    if concept.startswith("@"):
        return concept_of_texts(read_lines(concept[1:], "concept"), blocks, size, read, model.tokenizer)
    return concept_of_words(parse_words(concept), blocks, size, read, model.tokenizer)


def latent_reader(model: Bundle) -> Reader:
    """What the latent of a chunk of text is to this model: its own expectation where a decoder inside the chunk reads it, else
    the autoencoder's posterior mean."""
    if isinstance(model.lm, LatentLM) and model.lm.context_decoder is not None:
        return expected(require_steerable(model.predictor))
    return encoded(_autoencoder(model))


def wanted_critic(model: Bundle, concept: str, data: str | Path | None = None, by: By = "auto") -> tuple[Any, str]:
    """The critic of a concept, and in words what it was found in: `by` what the decoder makes of latents (text), or by their
    direction; auto = text where what is written follows from latents alone."""
    writer = model.lm.context_decoder if isinstance(model.lm, LatentLM) else None
    if by == "text" or (by == "auto" and not (writer is not None and writer.config.use_hidden)):
        critic, count = topic_critic(model, concept, data)
        return critic, f"{count} passages of text"
    direction, count = concept_critic(model, concept, data)
    return direction, f"{count} chunks of text"


def gather_critic(
    model: Bundle,
    concepts: Sequence[str] = (),
    critics: Sequence[str] = (),
    data: str | Path | None = None,
    by: By = "auto",
) -> tuple[Any, str]:
    """One critic of concepts (`wanted_critic`) and folders of trained critics, and what it wants in words. Each may end in
    `=WEIGHT`.

    Raises:
        UsageError: neither concept nor critic, or one that cannot be had.
    """
    parts, said = [], []
    for concept in concepts:
        words, weight = _weight(concept)
        critic, found = wanted_critic(model, words, data, by)
        parts.append((weight, critic))
        said.append(f"{_times(weight)}concept {words} ({found})")
    for folder in critics:
        name, weight = _weight(folder)
        critic, description = load_critic(name, _autoencoder(model))
        parts.append((weight, critic))
        said.append(f"{_times(weight)}critic {description.get('wanted', name)}")
    return weighted(parts), " + ".join(said)


def align(
    model: Bundle,
    prompts: Sequence[str],
    critic: Any,
    *,
    config: SealConfig | None = None,
    max_tokens: int = 128,
    judge: Bundle | None = None,
    controls: bool = False,
    steer: float | None = None,
    wanted: str = "a critic of one's own",
    seed: int = 0,
) -> AlignmentReport:
    """Adapts to each prompt, writes standard and aligned texts from the same noise, and says what changed.

    Args:
        critic: latents `[S B N Z]` -> rewards `[S B]` (`calm.ttt.critic`).
        judge: a token model of another run, by whose bits per byte texts are compared; none = the base model's energy score.
        controls: also everything else that could have raised the reward (`calm.ttt.controls`).
        steer: how far steering adds to every latent; none = as far as adaptation moved them.
        wanted: what the critic wants, for the report.
    Raises:
        UsageError: prompts or texts beyond the model's context, or a critic that gives nonsense.
        DivergedError: adaptation broke; the model is as it was.
    """
    if not isinstance(model.predictor, NextVector):
        require_steerable(model.predictor)
    writer = Writer(model, config or SealConfig(), prompts, critic, max_tokens=max_tokens, judge=judge, seed=seed)
    standard = writer.standard
    began = time.perf_counter()
    rewired = writer.rewire(critic)
    aligned = writer.best(rewired.changes)
    seconds = time.perf_counter() - began
    flops = writer.cost
    ways = [writer.way("standard", standard, flops.text), writer.way("aligned", aligned, flops.total)]
    rolled_back = writer.seal.config.brakes.reads_too_badly(ways[1].fluency, ways[0].fluency)
    if rolled_back.any():
        ways[1] = _rolled_back(ways[0], ways[1], rolled_back)
        rewired = _undone(rewired, rolled_back)
    if controls:
        for name in CONTROLS:
            written, paid = writer.control(name, rewired, aligned, steer)
            ways.append(writer.way(f"best of {flops.texts}" if name == "best of S" else name, written, paid))
    return AlignmentReport(
        prompts=tuple(prompts),
        critic=wanted,
        settings=writer.settings(max_tokens, seed),
        fluency_of=writer.fluency_of,
        before=rewired.before,
        after=rewired.after,
        drift=rewired.drift,
        norm=rewired.norm,
        steps=tuple(rewired.steps.tolist()),
        rolled_back=rolled_back,
        delta_of_chance=writer.delta(writer.act(keys="chance")),
        ways=tuple(ways),
        seconds=seconds,
    )


class Writer:
    """Prompts, a critic and a seed: everything that is written for them in one way or another."""

    def __init__(
        self,
        model: Bundle,
        config: SealConfig,
        prompts: Sequence[str] | Sequence[Int[np.ndarray, "_"]],
        critic: Any,
        *,
        max_tokens: int,
        judge: Bundle | None = None,
        seed: int = 0,
    ):
        self.model, self.critic = model, critic
        self.judge: Judge | None = None if judge is None else as_judge(judge, model)
        self.seal = Seal(model.predictor, model.tokenizer, config)
        if not prompts:
            raise UsageError("prompts: give at least one (the empty prompt is unconditional)")
        if max_tokens < 1:
            raise UsageError(f"max_tokens must be at least 1, got {max_tokens}")
        ids = [model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        self.texts_before = [model.tokenizer.decode(row) for row in ids]
        self.num_chunks, self.max_tokens = -(-max_tokens // model.chunk_size), max_tokens
        self._require_room(ids)
        self.prompts: Prompts = self.seal.read(ids)
        self.key = jax.random.key(seed)
        self.keys = row_keys(self.key, len(ids))
        self.standard = self.act()
        written = (jax.numpy.swapaxes(x, 0, 1) for x in (self.standard.latents, self.standard.chunks))
        checked_rewards(critic, *written)
        predictor = self.seal.predictor
        lengths = [num_chunks(len(row), model.chunk_size) for row in ids]
        self.cost: AlignmentCost = alignment_cost(
            self.seal.config,
            predictor.lm.config,
            predictor.autoencoder.config,
            prompt_chunks=round(sum(lengths) / len(lengths)),
            num_chunks=self.num_chunks,
            reads_chunks=reads_chunks(critic),
        )

    def rewire(self, critic: Any) -> Rewired:
        """Fast weights by this critic."""
        return self.seal.rewire(critic, self.prompts, self.keys)

    def act(self, changes: Any = None, *, keys: str | None = None, num_texts: int = 1, shifts: Any = None) -> Acted:
        """Texts by the noise of the standard ones, or by noise of another name; rewards are those of the critic."""
        own = self.keys if keys is None else row_keys(stream(self.key, keys), len(self.prompts.starts))
        options: dict[str, Any] = dict(num_chunks=self.num_chunks, num_texts=num_texts, shifts=shifts)
        return self.seal.act(self.critic, self.prompts, own, changes, **options)

    def best(self, changes: Any) -> Acted:
        """What the critic likes best of the texts that changed weights write (`SealConfig.texts`)."""
        return self.act(changes, num_texts=self.seal.config.texts).best()

    def control(self, name: str, rewired: Rewired, aligned: Acted, steer: float | None = None) -> tuple[Acted, float]:
        """One of `CONTROLS`: its texts, and what one of them cost."""
        if name == "shuffled reward":
            shuffled = ShuffledCritic.of(self.critic, stream(self.key, "shuffled"), aligned.latents.shape[-1])
            return self.best(self.rewire(shuffled).changes), self.cost.total
        if name == "random direction":
            keys = row_keys(stream(self.key, "random direction"), len(self.prompts.starts))
            return self.best(random_changes(keys, rewired.changes)), self.cost.total
        if name == "best of S":
            return self.act(num_texts=self.cost.texts).best(), self.cost.texts * (self.cost.text + self.cost.judging)
        length = moved(self.standard.latents, aligned.latents) if steer is None else np.full(len(aligned.latents), steer)
        toward = directions(self.critic, self.standard.latents, self.standard.chunks)
        return self.act(shifts=length[:, None] * toward), self.cost.text

    def way(self, name: str, acted: Acted, flops: float) -> Way:
        """The first text of each prompt, and its numbers."""
        return Way(
            name=name,
            texts=tuple(self.decoded(acted)),
            rewards=acted.rewards[:, 0],
            fluency=self.fluency(acted),
            delta=self.delta(acted),
            flops=flops,
        )

    def tokens(self, acted: Acted) -> Int[np.ndarray, "B T"]:
        """Those of the first text of each prompt."""
        return acted.chunks[:, 0].reshape(len(acted.chunks), -1)[:, : self.max_tokens]

    def decoded(self, acted: Acted) -> list[str]:
        return [self.model.tokenizer.decode(row) for row in self.tokens(acted)]

    @property
    def fluency_of(self) -> str:
        return "bits/byte by the judge" if self.judge is not None else "energy by the base model"

    def fluency(self, acted: Acted) -> Float[np.ndarray, "B"]:
        """Of the first text of each prompt, lower being better."""
        if self.judge is None:
            return self.seal.energy(self.prompts, acted.chunks[:, :1], self.keys)[:, 0].astype(np.float64)
        texts = self.decoded(acted)
        num_bytes = np.array([len(text.encode()) for text in texts], np.float64)
        nats = self.judge.nats(self.texts_before, texts)
        return np.where(num_bytes > 0, nats / np.maximum(num_bytes, 1) / np.log(2), np.nan)

    def delta(self, acted: Acted) -> Float[np.ndarray, "B"]:
        """SEAL delta of the first text of each prompt: its mean latent's distance from that of the standard text."""
        own, standard = (self._mean_latents(each) for each in (acted, self.standard))
        return np.linalg.norm(own - standard, axis=-1)

    def settings(self, max_tokens: int, seed: int) -> str:
        """What the numbers depend on."""
        config = self.seal.config
        rank = f" of rank {config.fast.rank}" if config.fast.rank else ""
        return (
            f"{len(self.prompts.starts)} prompts, at most {max_tokens} tokens, T = 1; {config.inner_steps} steps of "
            f"{config.optimizer} at {config.rate:g} on {config.samples} futures of {config.chunks} chunks; fast weights: "
            f"{config.fast.part}{rank}, {config.fast.size(self.seal.params):,} numbers; feedback {config.feedback}; seed {seed}"
        )

    def _mean_latents(self, acted: Acted) -> Float[np.ndarray, "B Z"]:
        graphdef, params = nnx.split(self.seal.predictor.autoencoder)
        return np.asarray(_encoded_mean(graphdef, params, jax.numpy.asarray(acted.chunks[:, 0])))

    def _require_room(self, ids: Sequence[Int[np.ndarray, "_"]]) -> None:
        context = self.model.block_tokens // self.model.chunk_size
        longest = max(self.num_chunks, self.seal.config.chunks)
        for row, prompt in enumerate(ids):
            length = num_chunks(len(prompt), self.model.chunk_size)
            if length + longest > context:
                raise UsageError(
                    f"prompt {row} has {length} chunks of {self.model.chunk_size} tokens; with {longest} more (max_tokens, or "
                    f"chunks of a future) that is beyond the context of {context}"
                )


_encoded_mean = jax.jit(
    lambda graphdef, params, chunks: nnx.merge(graphdef, params).encode(chunks).mean.mean(1), static_argnums=0
)


def _rolled_back(standard: Way, aligned: Way, rows: np.ndarray) -> Way:
    """The aligned texts, standard ones in their place where `rows` says so."""
    texts = tuple(one if back else two for one, two, back in zip(standard.texts, aligned.texts, rows, strict=True))
    numbers = {
        name: np.where(rows, getattr(standard, name), getattr(aligned, name)) for name in ("rewards", "fluency", "delta")
    }
    return Way(name=aligned.name, texts=texts, flops=aligned.flops, **numbers)


def _undone(rewired: Rewired, rows: np.ndarray) -> Rewired:
    """Without change in these rows."""

    def kept(x: np.ndarray, nothing: Any = 0) -> np.ndarray:
        return np.where(rows.reshape(-1, *[1] * (x.ndim - 1)), nothing, x).astype(x.dtype)

    return rewired._replace(
        changes=jax.tree.map(kept, rewired.changes),
        after=kept(rewired.after, rewired.before),
        drift=kept(rewired.drift),
        norm=kept(rewired.norm),
    )


class _Weighted(NamedTuple):
    what: str
    weight: float


def _weight(words: str) -> _Weighted:
    """ "war,army=2" -> ("war,army", 2.0)."""
    what, found, number = words.rpartition("=")
    if not found:
        return _Weighted(words, 1.0)
    try:
        return _Weighted(what, float(number))
    except ValueError as error:
        raise UsageError(f"{words!r}: behind = stands a weight, a number such as {what}=0.5") from error


def _times(weight: float) -> str:
    return "" if weight == 1 else f"{weight:g} times "


def _autoencoder(model: Bundle) -> Autoencoder:
    if model.autoencoder is None:
        raise UsageError(f"{model.folder}: holds a token model, which has no latents to align; name a latent language model")
    return model.autoencoder
