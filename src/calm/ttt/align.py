"""Alignment of a trained model to a critic, prompt by prompt, text in and text out (docs/ttt.md).

Controls show what else could have raised the reward:

    shuffled reward     the same adaptation by a critic that sees the latents' dimensions in another order
    random direction    a change of the weights as long as the adapted one in every weight, in a random direction
    best of S           no change: as many texts as the FLOPs of adaptation pay for, of which the critic picks the best
    steering            no change: the concept's direction is added to every latent, as far as adaptation moved them
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from calm.core.predictor import NextVector
from calm.errors import UsageError
from calm.evaluate.tables import table
from calm.evaluate.writing import Judge
from calm.rng import row_keys, stream
from calm.runs.bundle import Bundle
from calm.runs.evaluation import as_judge
from calm.text.chunking import num_chunks
from calm.ttt import fast_weights
from calm.ttt.cost import AlignmentCost, alignment_cost
from calm.ttt.critic import DirectionCritic, ShuffledCritic, checked_rewards, reads_chunks, rewards_of
from calm.ttt.fast_weights import Change
from calm.ttt.rollout import require_steerable
from calm.ttt.seal import Adaptation, Continuations, Prompts, Seal, SealConfig

CONTROLS = ("shuffled reward", "random direction", "best of S", "steering")


# -- report -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """Texts of B prompts: standard, aligned or by a control."""

    name: str
    texts: tuple[str, ...]
    rewards: Float[np.ndarray, "B"]
    fluency: Float[np.ndarray, "B"]
    """lower reads better: the judge's bits per byte, or the base model's energy score; nan for a text without bytes"""
    delta: Float[np.ndarray, "B"]
    """SEAL delta: distance between the encoder's mean latents of this text and of the standard one"""
    flops: float
    """for one prompt"""

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlignmentReport:
    """Result of an adaptation to B prompts, and of its controls."""

    prompts: tuple[str, ...]
    critic: str
    """description of what was wanted"""
    settings: str
    fluency_of: str
    """measure of `Variant.fluency`"""
    before: Float[np.ndarray, "B"]
    """mean reward of unseen futures of the base model"""
    after: Float[np.ndarray, "B"]
    """and of the adapted model, from the same noise"""
    drift: Float[np.ndarray, "B"]
    norm: Float[np.ndarray, "B"]
    steps: tuple[int, ...]
    rolled_back: Bool[np.ndarray, "B"]
    """aligned texts that were replaced by the standard ones (`Brakes.max_loss`)"""
    delta_of_chance: Float[np.ndarray, "B"]
    """SEAL delta between two standard texts of different noise, the level of chance"""
    variants: tuple[Variant, ...]
    """standard first, then aligned, then the controls"""
    seconds: float
    """adapting and writing the aligned texts, compiling included"""

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)

    def to_dict(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "variants"}
        plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
        return plain | {"ways": [variant.to_dict() for variant in self.variants]}

    def text(self) -> str:
        """Texts and numbers for printing."""
        parts = [f"wanted: {self.critic}"]
        for row, prompt in enumerate(self.prompts):
            parts += [f"[{variant.name}] {prompt}{variant.texts[row]}" for variant in self.variants[:2]]
            if self.rolled_back[row]:
                parts.append("rolled back: the aligned text read too badly, so the standard one and the base weights remain")
        parts.append(self.table())
        numbers = [
            f"reward of unseen futures {_mean(self.before)} -> {_mean(self.after)}",
            f"drift {_mean(self.drift)}",
            f"length of the change {_mean(self.norm)} of the weights'",
            f"steps {min(self.steps)} to {max(self.steps)}" if len(set(self.steps)) > 1 else f"steps {self.steps[0]}",
            f"SEAL delta by chance {_mean(self.delta_of_chance)}",
            f"{self.seconds:.1f} s",
        ]
        return "\n\n".join([*parts, ", ".join(numbers), self.settings])

    def table(self, *, markdown: bool = False) -> str:
        """A row for each variant: means over prompts."""
        rows = [
            [each.name, *map(_mean, (each.rewards, each.fluency, each.delta)), f"{each.flops:.3g}"] for each in self.variants
        ]
        return table(["text", "reward", self.fluency_of, "SEAL delta", "FLOPs"], rows, markdown=markdown)


def _mean(values: Float[np.ndarray, "B"] | Sequence[float]) -> str:
    finite = np.asarray(values)[np.isfinite(values)]
    return f"{finite.mean():.3f}" if len(finite) else "-"


# -- alignment --------------------------------------------------------------------------------------------------------


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
    """Adapts to each prompt, writes standard and aligned texts from the same noise, and compares them.

    Args:
        critic: latents `[S B N Z]` -> rewards `[S B]` (`calm.ttt.critic`).
        judge: a token model of another run, whose bits per byte measure fluency; None = the base model's energy score.
        controls: also the `CONTROLS` of this module.
        steer: length that steering adds to every latent; None = as far as adaptation moved them.
        wanted: description of the critic's aim, for the report.

    Raises:
        UsageError: prompts or texts beyond the model's context, or a critic whose rewards are invalid.
        DivergedError: a reward, gradient or weight is not finite; the model is unchanged.
    """
    if not isinstance(model.predictor, NextVector):
        require_steerable(model.predictor)
    comparison = Comparison(model, config or SealConfig(), prompts, critic, max_tokens=max_tokens, judge=judge, seed=seed)
    standard = comparison.standard
    began = time.perf_counter()
    adaptation = comparison.adapt(critic)
    aligned = comparison.best(adaptation.changes)
    seconds = time.perf_counter() - began
    flops = comparison.cost
    variants = [
        comparison.variant("standard", standard, flops.text),
        comparison.variant("aligned", aligned, flops.total),
    ]
    rolled_back = comparison.seal.config.brakes.reads_too_badly(variants[1].fluency, variants[0].fluency)
    if rolled_back.any():
        variants[1] = _rolled_back(variants[0], variants[1], rolled_back)
        adaptation = _undone(adaptation, rolled_back)
    if controls:
        for name in CONTROLS:
            written, paid = comparison.control(name, adaptation, aligned, steer)
            variants.append(comparison.variant(f"best of {flops.texts}" if name == "best of S" else name, written, paid))
    return AlignmentReport(
        prompts=tuple(prompts),
        critic=wanted,
        settings=comparison.settings(max_tokens, seed),
        fluency_of=comparison.fluency_of,
        before=adaptation.before,
        after=adaptation.after,
        drift=adaptation.drift,
        norm=adaptation.norm,
        steps=tuple(adaptation.steps.tolist()),
        rolled_back=rolled_back,
        delta_of_chance=comparison.delta(comparison.write(keys="chance")),
        variants=tuple(variants),
        seconds=seconds,
    )


class Comparison:
    """Texts for the same prompts, critic and seed: standard, aligned and by the controls."""

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
        self.standard = self.write()
        checked_rewards(critic, *(jnp.swapaxes(x, 0, 1) for x in (self.standard.latents, self.standard.chunks)))
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

    def adapt(self, critic: Any) -> Adaptation:
        """Fast weights for this critic."""
        return self.seal.adapt(critic, self.prompts, self.keys)

    def write(self, changes: Any = None, *, keys: str | None = None, num_texts: int = 1, shifts: Any = None) -> Continuations:
        """Texts from the noise of the standard ones, or from noise called `keys`, with the critic's rewards."""
        own = self.keys if keys is None else row_keys(stream(self.key, keys), len(self.prompts.starts))
        options: dict[str, Any] = dict(num_chunks=self.num_chunks, num_texts=num_texts, shifts=shifts)
        return self.seal.write(self.critic, self.prompts, own, changes, **options)

    def best(self, changes: Any) -> Continuations:
        """Text of the highest reward, of those that changed weights write for each prompt (`SealConfig.texts`)."""
        return self.write(changes, num_texts=self.seal.config.texts).best()

    def control(
        self, name: str, adaptation: Adaptation, aligned: Continuations, steer: float | None = None
    ) -> tuple[Continuations, float]:
        """Texts of one of `CONTROLS`, and their FLOPs for one prompt."""
        if name == "shuffled reward":
            shuffled = ShuffledCritic.of(self.critic, stream(self.key, "shuffled"), aligned.latents.shape[-1])
            return self.best(self.adapt(shuffled).changes), self.cost.total
        if name == "random direction":
            keys = row_keys(stream(self.key, "random direction"), len(self.prompts.starts))
            return self.best(random_changes(keys, adaptation.changes)), self.cost.total
        if name == "best of S":
            return self.write(num_texts=self.cost.texts).best(), self.cost.texts * (self.cost.text + self.cost.judging)
        length = moved(self.standard.latents, aligned.latents) if steer is None else np.full(len(aligned.latents), steer)
        toward = directions(self.critic, self.standard.latents, self.standard.chunks)
        return self.write(shifts=length[:, None] * toward), self.cost.text

    def variant(self, name: str, written: Continuations, flops: float) -> Variant:
        """First text of each prompt, and its measures."""
        return Variant(
            name=name,
            texts=tuple(self.decoded(written)),
            rewards=written.rewards[:, 0],
            fluency=self.fluency(written),
            delta=self.delta(written),
            flops=flops,
        )

    def tokens(self, written: Continuations) -> Int[np.ndarray, "B T"]:
        """Tokens of the first text of each prompt."""
        return written.chunks[:, 0].reshape(len(written.chunks), -1)[:, : self.max_tokens]

    def decoded(self, written: Continuations) -> list[str]:
        return [self.model.tokenizer.decode(row) for row in self.tokens(written)]

    @property
    def fluency_of(self) -> str:
        return "bits/byte by the judge" if self.judge is not None else "energy by the base model"

    def fluency(self, written: Continuations) -> Float[np.ndarray, "B"]:
        """Fluency of the first text of each prompt; lower is better."""
        if self.judge is None:
            return self.seal.energy(self.prompts, written.chunks[:, :1], self.keys)[:, 0].astype(np.float64)
        texts = self.decoded(written)
        num_bytes = np.array([len(text.encode()) for text in texts], np.float64)
        nats = self.judge.nats(self.texts_before, texts)
        return np.where(num_bytes > 0, nats / np.maximum(num_bytes, 1) / np.log(2), np.nan)

    def delta(self, written: Continuations) -> Float[np.ndarray, "B"]:
        """SEAL delta of the first text of each prompt: distance of its mean latent from that of the standard text."""
        own, standard = (self._mean_latents(each) for each in (written, self.standard))
        return np.linalg.norm(own - standard, axis=-1)

    def settings(self, max_tokens: int, seed: int) -> str:
        """Settings that the numbers depend on, in a line."""
        config = self.seal.config
        rank = f" of rank {config.fast.rank}" if config.fast.rank else ""
        return (
            f"{len(self.prompts.starts)} prompts, at most {max_tokens} tokens, T = 1; {config.inner_steps} steps of "
            f"{config.optimizer} at {config.rate:g} on {config.samples} futures of {config.chunks} chunks; fast weights: "
            f"{config.fast.part}{rank}, {config.fast.size(self.seal.params):,} numbers; feedback {config.feedback}; seed {seed}"
        )

    def _mean_latents(self, written: Continuations) -> Float[np.ndarray, "B Z"]:
        graphdef, params = nnx.split(self.seal.predictor.autoencoder)
        return np.asarray(_encoded_mean(graphdef, params, jnp.asarray(written.chunks[:, 0])))

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


def _rolled_back(standard: Variant, aligned: Variant, rows: np.ndarray) -> Variant:
    """The aligned texts, replaced by the standard ones in `rows`."""
    texts = tuple(one if back else two for one, two, back in zip(standard.texts, aligned.texts, rows, strict=True))
    numbers = {
        name: np.where(rows, getattr(standard, name), getattr(aligned, name)) for name in ("rewards", "fluency", "delta")
    }
    return Variant(name=aligned.name, texts=texts, flops=aligned.flops, **numbers)


def _undone(adaptation: Adaptation, rows: np.ndarray) -> Adaptation:
    """The adaptation without changes in `rows`."""

    def kept(x: np.ndarray, nothing: Any = 0) -> np.ndarray:
        return np.where(rows.reshape(-1, *[1] * (x.ndim - 1)), nothing, x).astype(x.dtype)

    return adaptation._replace(
        changes=jax.tree.map(kept, adaptation.changes),
        after=kept(adaptation.after, adaptation.before),
        drift=kept(adaptation.drift),
        norm=kept(adaptation.norm),
    )


# -- controls ---------------------------------------------------------------------------------------------------------


def random_changes(keys: Array, changes: Change) -> Change:
    """For each prompt a change in a random direction, of the same length in every weight."""
    return jax.vmap(fast_weights.random_like)(keys, jax.tree.map(jnp.asarray, changes))


def directions(
    critic: Any, latents: Float[np.ndarray, "B S N Z"], chunks: Int[np.ndarray, "B S N K"]
) -> Float[np.ndarray, "B Z"]:
    """Direction, of length 1, in which a shift of all latents of a prompt's texts raises the reward most.

    A concept's own direction; for other critics the gradient of the reward at the texts.
    """
    if isinstance(critic, DirectionCritic):
        return np.broadcast_to(np.asarray(critic.direction), (len(latents), latents.shape[-1]))

    def reward(shift: Float[Array, "B Z"]) -> Float[Array, ""]:
        moved = jnp.swapaxes(jnp.asarray(latents) + shift[:, None, None], 0, 1)
        return rewards_of(critic, moved, jnp.swapaxes(jnp.asarray(chunks), 0, 1)).mean()

    slope = np.asarray(jax.grad(reward)(jnp.zeros((len(latents), latents.shape[-1]))))
    return slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-12)


def moved(standard: Float[np.ndarray, "B S N Z"], aligned: Float[np.ndarray, "B S N Z"]) -> Float[np.ndarray, "B"]:
    """Distance between the mean latents of each prompt's standard and aligned texts."""
    return np.linalg.norm(aligned.mean((1, 2)) - standard.mean((1, 2)), axis=-1)
