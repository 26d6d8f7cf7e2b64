"""Latent test-time training, for one prompt at inference:

    hypothesise    S latent futures of N chunks start from the prompt's state (`calm.ttt.rollout`)
    critique       a critic gives each a reward (`calm.ttt.critic`)
    rewire         gradient steps on fast weights raise the mean reward (`calm.ttt.fast_weights`, `calm.ttt.brakes`)
    act            the adapted weights write the text again, and are then discarded

`Seal.adapt` is the first three, `Seal.write` the last. Every prompt of a batch has fast weights of its own; one compiled
program serves all prompts, concepts, critics and rates of the same shapes. Each inner step draws new futures from noise of
its own, and reported rewards are of noise that no step has used.

Source: J. Adam 2025, "Calm-Seal", a description without code that calls this SEAL, self-editing alignment layer. It is not the
SEAL of Zweiger et al. 2025 (arXiv:2506.10943), whose model writes its own fine-tuning data. The frame is test-time training
(Sun et al. 2020, arXiv:1909.13231); there the loss is self-supervised on the input, here it is a reward on the output.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core.energy_score import energy_loss
from calm.core.generate import HasSpecialIds, laid_out
from calm.core.predictor import NextVector
from calm.core.vocabulary import ScoringTable
from calm.errors import DivergedError, UsageError
from calm.rng import PRNGKey, stream
from calm.ttt import fast_weights
from calm.ttt.brakes import Brakes, drift
from calm.ttt.critic import as_pytree, rewards_of
from calm.ttt.fast_weights import Change, FastWeightsConfig
from calm.ttt.rollout import Feedback, default_feedback, draw_noise, futures, read_prompt, require_steerable

Optimizer = Literal["relative", "sgd", "adam"]
FLUENCY_SAMPLES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class SealConfig:
    """Settings of adaptation to a prompt."""

    samples: int = 8
    """S futures at each inner step"""
    chunks: int = 8
    """N chunks of each"""
    inner_steps: int = 3
    """gradient steps"""
    rate: float = 1e-2
    """step size, in the unit of the optimizer"""
    optimizer: Optimizer = "relative"
    """relative: steps along the gradient of length `rate` times that of the weights that change, so that one rate suits
    critics of any steepness; sgd: rate times gradient; adam"""
    fast: FastWeightsConfig = FastWeightsConfig()
    feedback: Feedback | Literal["auto"] = "auto"
    """gradient between chunks (`calm.ttt.rollout`): constant, straight_through, or latent, for stems that read latents
    alone; auto = latent there, else constant"""
    brakes: Brakes = Brakes()
    texts: int = 1
    """texts that the adapted weights write for a prompt; the one of the highest reward is kept"""
    at_once: int = 8
    """prompts adapted side by side; memory grows with it (docs/ttt.md)"""

    def __post_init__(self) -> None:
        if not 2 <= self.samples <= 4096 or not 1 <= self.chunks <= 4096:
            raise UsageError(
                f"alignment: samples must lie in 2 .. 4096 and chunks in 1 .. 4096, got {self.samples} and {self.chunks}"
            )
        if not 1 <= self.inner_steps <= 1000:
            raise UsageError(f"alignment: inner_steps must lie in 1 .. 1000, got {self.inner_steps}")
        if not (0 < self.rate <= 1000):
            raise UsageError(f"alignment: rate must lie in (0, 1000], got {self.rate}")
        if not 1 <= self.texts <= 4096:
            raise UsageError(f"alignment: texts must lie in 1 .. 4096, got {self.texts}")
        if self.at_once < 1:
            raise UsageError(f"alignment: at_once must be at least 1, got {self.at_once}")


class Prompts(NamedTuple):
    """Prompts in the layout of generation: padded on the left, their ends at chunk boundaries."""

    chunks: Int[np.ndarray, "B N K"]
    starts: Int[np.ndarray, "B"]


class Adaptation(NamedTuple):
    """Result of adaptation to B prompts."""

    changes: Change
    """fast weights, with a leading axis B"""
    rewards: Float[np.ndarray, "B T"]
    """mean reward of the futures of each inner step, before its update"""
    before: Float[np.ndarray, "B"]
    """mean reward of futures of the base weights, from noise that no step has used"""
    after: Float[np.ndarray, "B"]
    """and of the adapted weights, from the same noise"""
    drift: Float[np.ndarray, "B"]
    """energy coefficient between the two at the prompt's state (`calm.ttt.brakes`)"""
    norm: Float[np.ndarray, "B"]
    """length of the change, relative to the weights changed"""
    steps: Int[np.ndarray, "B"]
    """number of updates, fewer than requested where a brake stopped them"""


class Continuations(NamedTuple):
    """S texts for each of B prompts, as latents and as chunks, with their rewards."""

    latents: Float[np.ndarray, "B S N Z"]
    chunks: Int[np.ndarray, "B S N K"]
    rewards: Float[np.ndarray, "B S"]

    def best(self) -> "Continuations":
        """The text of the highest reward for each prompt, S = 1."""
        rows, pick = np.arange(len(self.rewards)), self.rewards.argmax(1)
        return Continuations(*(x[rows, pick][:, None] for x in self))


class Seal:
    """Adapts a next-vector model to prompts, and writes with the adapted weights. The model itself is never changed.

    Raises:
        UsageError: a model whose text does not depend on latents, or a feedback that its stem does not allow.
    """

    def __init__(self, predictor: Any, special: HasSpecialIds, config: SealConfig | None = None):
        self.predictor: NextVector = require_steerable(predictor)
        self.config, self.special = config or SealConfig(), special
        feedback = self.config.feedback
        if feedback == "latent" and self.predictor.lm.config.stem != "continuous":
            raise UsageError(
                f"alignment: feedback latent needs a stem that reads latents alone, this model's is "
                f"{self.predictor.lm.config.stem!r}; use constant or straight_through"
            )
        if feedback == "auto":
            self.config = dataclasses.replace(self.config, feedback=default_feedback(self.predictor))
        self.graphdef, self.params = nnx.split(self.predictor)
        # Without an end token all futures have N chunks, so that rewards and texts are comparable.
        allowed = np.setdiff1d(np.arange(self.predictor.vocab_size), [special.begin_id, special.mask_id, special.end_id])
        ids = jnp.asarray(allowed, jnp.int32)
        self.table = ScoringTable.of(self.predictor.table, self.predictor.precision, ids)

    def read(self, prompts: Sequence[Int[np.ndarray, "_"]]) -> Prompts:
        """Lays out prompts given as token ids."""
        return Prompts(*laid_out(list(prompts), self.predictor.chunk_size, self.special.begin_id))

    def adapt(self, critic: Any, prompts: Prompts, keys: Array) -> Adaptation:
        """Fast weights for each prompt, with random keys `[B]`.

        Raises:
            DivergedError: a reward, its gradient or the weights stopped being finite.
        """
        program = partial(_adapt, _static(self.config), self.graphdef)
        found, broken = self._by_groups(program, critic, prompts, keys, (), _traced_settings(self.config))
        if (broken >= 0).any():
            row = int(np.argmax(broken >= 0))
            raise DivergedError(
                f"alignment: reward, gradient or weights are not finite at inner step {broken[row]} of prompt {row}; use a "
                f"rate below {self.config.rate:g}, or a critic with finite slopes. The model is as it was"
            )
        return found

    def write(
        self,
        critic: Any,
        prompts: Prompts,
        keys: Array,
        changes: Change | None = None,
        *,
        num_chunks: int,
        num_texts: int = 1,
        shifts: Float[np.ndarray, "B Z"] | None = None,
    ) -> Continuations:
        """`num_texts` texts of `num_chunks` chunks for each prompt, at temperature 1, without an end.

        `changes` are those of `adapt`, None = the base weights; `shifts` are added to every latent. The same keys give the
        same noise for any weights, and the single text of a key is the one that `calm.core.generate` writes with it.
        """
        program = partial(_write, (num_texts, num_chunks), self.graphdef)
        nowhere = np.zeros((len(prompts.starts), self.predictor.autoencoder.config.latent_dim), np.float32)
        extra = (changes, nowhere if shifts is None else shifts.astype(np.float32))
        return self._by_groups(program, critic, prompts, keys, extra, None)

    def energy(self, prompts: Prompts, chunks: Int[np.ndarray, "B S N K"], keys: Array) -> Float[np.ndarray, "B S"]:
        """Mean energy score of each text's chunks under the base model, given the prompt: lower is more likely.

        A substitute for fluency where no other model judges; it favours what the model itself would write.
        """
        program = partial(_energy, self.graphdef)
        return self._by_groups(program, None, prompts, keys, (jnp.asarray(chunks),), None)

    def adapted(self, adaptation: Adaptation, row: int = 0) -> NextVector:
        """Predictor with the adapted weights of one prompt, such as for `calm.core.generate`; changed weights are copies."""
        change = jax.tree.map(lambda x: jnp.asarray(x[row]), adaptation.changes)
        return nnx.merge(self.graphdef, fast_weights.adapted(self.params, change))

    def _by_groups(self, program: Any, critic: Any, prompts: Prompts, keys: Array, extra: tuple, settings: Any) -> Any:
        """Runs a program for `at_once` prompts at a time, the last group filled up with copies."""
        count = len(prompts.starts)
        if keys.shape[0] != count:
            raise UsageError(f"{keys.shape[0]} keys for {count} prompts: give one key a row (calm.rng.row_keys)")
        size = min(self.config.at_once, count)
        pick = np.minimum(np.arange(-(-count // size) * size), count - 1)
        rows = jax.tree.map(lambda x: jnp.asarray(x)[pick], (prompts.chunks, prompts.starts, keys, *extra))
        groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), rows)
        critic = None if critic is None else as_pytree(critic)
        result = program(self.params, critic, self.table, settings, groups)
        return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:])[:count], result)


# -- compiled ---------------------------------------------------------------------------------------------------------


class TracedSettings(NamedTuple):
    """Traced settings; changing them does not recompile."""

    rate: Float[Array, ""]
    penalty: Float[Array, ""]
    max_drift: Float[Array, ""]
    max_norm: Float[Array, ""]
    enough: Float[Array, ""]


def _traced_settings(config: SealConfig) -> TracedSettings:
    brakes = config.brakes
    numbers = (config.rate, brakes.penalty, brakes.max_drift, brakes.max_norm, brakes.enough)
    return TracedSettings(*(jnp.float32(jnp.inf if number is None else number) for number in numbers))


def _static(config: SealConfig) -> SealConfig:
    """The configuration with traced settings replaced by constants, as the static argument of a program."""
    watched = Brakes(penalty=float(config.brakes.penalty > 0), max_drift=None if config.brakes.max_drift is None else 1.0)
    return dataclasses.replace(config, rate=1.0, brakes=watched, texts=1)


def _mapped(one: Any, groups: Any) -> Any:
    """`one(*row)` for all rows, those of a group side by side."""
    return jax.lax.map(lambda rows: jax.vmap(one)(*rows), groups)


@partial(jax.jit, static_argnums=(0, 1))
def _adapt(
    config: SealConfig, graphdef: Any, params: Any, critic: Any, table: ScoringTable, settings: TracedSettings, groups: Any
) -> tuple[Adaptation, Int[Array, "G A"]]:
    """Adaptations, and the inner step at which each broke, -1 for none."""
    optimizer = (optax.adam if config.optimizer == "adam" else optax.sgd)(settings.rate)
    base: NextVector = nnx.merge(graphdef, params)
    sizes, feedback = (config.samples, config.chunks), config.feedback
    assert feedback != "auto"

    def one(chunks: Int[Array, "N K"], start: Int[Array, ""], key: PRNGKey) -> tuple[Adaptation, Int[Array, ""]]:
        prompt = read_prompt(base, chunks, start, *sizes)
        noise = draw_noise(base, stream(key, "drift"), config.samples, 1).latent
        assert noise is not None
        drift_noise = noise[0]
        no_change = config.fast.init(params, stream(key, "fast weights"))
        length = fast_weights.weights_norm(params, no_change)

        def model(change: Change) -> tuple[NextVector, Any]:
            """The adapted model, and its state after the prompt, which does not depend on the head."""
            adapted = nnx.merge(graphdef, fast_weights.adapted(params, change))
            return adapted, prompt if config.fast.part == "head" else read_prompt(adapted, chunks, start, *sizes)

        def reward_of(predictor: NextVector, at: Any, key: PRNGKey, feedback: Feedback) -> Float[Array, ""]:
            drawn = futures(predictor, at, draw_noise(base, key, *sizes), table, feedback=feedback)
            return rewards_of(critic, drawn.latents[:, None], drawn.chunks[:, None]).mean()

        def drift_of(predictor: NextVector, at: Any) -> Float[Array, ""]:
            there, here = (
                model.lm.head(hidden[None], drift_noise[:, None])[:, 0]
                for model, hidden in ((predictor, at.hidden), (base, prompt.hidden))
            )
            return drift(there, here)

        def loss(change: Change, key: PRNGKey) -> tuple[Float[Array, ""], Float[Array, ""]]:
            predictor, at = model(change)
            reward = reward_of(predictor, at, key, feedback)
            return (settings.penalty * drift_of(predictor, at) if config.brakes.penalty else 0.0) - reward, reward

        def inner(carry: Any, step: Int[Array, ""]) -> tuple[Any, Any]:
            change, state, stopped = carry
            (_, reward), gradient = jax.value_and_grad(loss, has_aux=True)(change, stream(key, "rewire", step))
            updates, new_state = optimizer.update(gradient, state)
            slope = fast_weights.step_length(change, gradient)
            if config.optimizer == "relative":
                unit = length / jnp.where(slope > 0, slope, 1.0)  # a slope of 0 is no step
                updates = jax.tree.map(lambda x: x * unit, updates)
            new: Change = jax.tree.map(jnp.add, change, updates)
            new = fast_weights.projected(new, settings.max_norm * length)
            finite = jnp.isfinite(reward) & jnp.isfinite(slope) & jnp.isfinite(fast_weights.norm(new))
            stop = stopped | ~finite | (reward >= settings.enough)
            if config.brakes.max_drift is not None:
                stop |= drift_of(*model(new)) > settings.max_drift
            kept = jax.tree.map(lambda new, old: jnp.where(stop, old, new), (new, new_state), (change, state))
            return (*kept, stop), (reward, ~stopped & ~finite, ~stop)

        def measure(change: Change) -> tuple[Float[Array, ""], Float[Array, ""]]:
            predictor, at = model(change)
            return reward_of(predictor, at, stream(key, "measure"), "constant"), drift_of(predictor, at)

        nothing = (no_change, optimizer.init(no_change), jnp.zeros((), bool))
        (change, _, _), (rewards, broken, made) = jax.lax.scan(inner, nothing, jnp.arange(config.inner_steps))
        # one after the other, so that futures are compiled once
        (before, after), (_, drifted) = jax.lax.map(measure, jax.tree.map(lambda *x: jnp.stack(x), no_change, change))
        norm = fast_weights.norm(change) / length
        traced: Any = (change, rewards, before, after, drifted, norm, made.sum())
        found = Adaptation(*traced)
        return found, jnp.where(broken.any(), jnp.argmax(broken), -1)

    return _mapped(one, groups)


@partial(jax.jit, static_argnums=(0, 1))
def _write(
    sizes: tuple[int, int], graphdef: Any, params: Any, critic: Any, table: ScoringTable, settings: None, groups: Any
) -> Continuations:
    def one(chunks: Array, start: Array, key: PRNGKey, change: Change | None, shift: Array) -> Continuations:
        weights = params if change is None else fast_weights.adapted(params, change)
        predictor: NextVector = nnx.merge(graphdef, weights)
        written = futures(
            predictor, read_prompt(predictor, chunks, start, *sizes), draw_noise(predictor, key, *sizes), table, shift=shift
        )
        traced: Any = (*written, rewards_of(critic, written.latents[:, None], written.chunks[:, None])[:, 0])
        return Continuations(*traced)

    return _mapped(one, groups)


@partial(jax.jit, static_argnums=0)
def _energy(
    graphdef: Any, params: Any, critic: None, table: ScoringTable, settings: None, groups: Any
) -> Float[Array, "G A S"]:
    def one(prompt: Int[Array, "P K"], start: Array, key: PRNGKey, chunks: Int[Array, "S N K"]) -> Float[Array, "S"]:
        predictor: NextVector = nnx.merge(graphdef, params)
        texts, length = chunks.shape[:2]
        whole = jnp.concatenate([jnp.broadcast_to(prompt, (texts, *prompt.shape)), chunks[:, :-1]], axis=1)
        state = predictor.init_state(texts, whole.shape[1], jnp.broadcast_to(start, (texts,)))
        hidden = predictor.hidden(whole, state)[0][:, -length:]
        samples = predictor.lm.sample(stream(key, "energy"), hidden, FLUENCY_SAMPLES)
        return energy_loss(samples, predictor.autoencoder.encode(chunks), stream(key, "draws")).mean(-1)

    return _mapped(one, groups)
