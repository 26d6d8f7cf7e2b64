"""The objectives that training minimises, for both stages; that of stage 2 is a sum of terms, each logged under its own name.

B batch · N chunks · K tokens per chunk · Z latent width · D model width · S samples · M target draws
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.config import FrozenDict
from calm.core.autoencoder import Autoencoder, AutoencoderConfig, Level
from calm.core.clipped_kl import clipped_kl
from calm.core.cross_entropy import fused_cross_entropy
from calm.core.dense import Precision
from calm.core.energy_score import Fidelity, energy_parts
from calm.core.latent_lm import LatentLM, LatentLMConfig
from calm.core.posterior import Posterior
from calm.core.response_mask import split_mask, target_weights
from calm.errors import UsageError
from calm.registry import Registered
from calm.rng import PRNGKey, stream

Terms = dict[str, Float[Array, ""]]


def as_chunks(tokens: Int[Array, "B T"], chunk_size: int) -> Int[Array, "B N K"]:
    """Cuts rows of tokens into chunks."""
    if tokens.shape[1] % chunk_size:
        raise UsageError(f"chunk size K={chunk_size} must divide the block of {tokens.shape[1]} tokens")
    return tokens.reshape(tokens.shape[0], -1, chunk_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AutoencoderLossConfig:
    """Terms and regularisers of stage 1 (CALM)."""

    kl_weight: float = 1e-3
    kl_clamp: float = 0.5
    """nats per dimension below which the KL term has no gradient; of a power_spherical posterior Z times that per chunk"""
    token_dropout: float = 0.15
    """share of input tokens replaced by the mask id"""
    latent_dropout: float = 0.15
    """share of latent dimensions set to zero, the others rescaled"""
    random_chunks: float = 0.3
    """share of chunks replaced by uniformly random tokens, input and target: teaches rare tokens; not in the paper"""

    def __post_init__(self) -> None:
        for name in ("token_dropout", "latent_dropout", "random_chunks"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"autoencoder loss: {name} must lie in [0, 1), got {getattr(self, name)}")
        if min(self.kl_weight, self.kl_clamp) < 0:
            raise UsageError("autoencoder loss: kl_weight and kl_clamp must not be negative")


class AutoencoderObjective:
    """K * cross-entropy + kl_weight * clipped KL, averaged over chunks, for every level of the autoencoder."""

    def __init__(
        self, model: AutoencoderConfig, loss: AutoencoderLossConfig, *, mask_id: int, precision: Precision = "float32"
    ):
        self.model, self.terms, self.mask_id, self.precision = model, loss, mask_id, precision
        self.frozen: Any = {}
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: model.build(rngs=nnx.Rngs(0), precision=precision)))

    def init(self, key: PRNGKey) -> Any:
        return nnx.state(self.model.build(rngs=nnx.Rngs(params=key), precision=self.precision))

    def module(self, params: Any) -> Autoencoder:
        """The autoencoder with these weights."""
        return nnx.merge(self.graphdef, params)

    def loss(
        self, params: Any, frozen: Any, tokens: Int[Array, "B T"], key: PRNGKey, step: int | Int[Array, ""] = 0
    ) -> tuple[Float[Array, ""], Terms]:
        autoencoder = self.module(params)
        tokens, _ = split_mask(tokens)  # the chunks of prompts are to be coded as well
        chunks = as_chunks(tokens, self.model.chunk_size).reshape(-1, self.model.chunk_size)
        if self.terms.random_chunks:
            random = jax.random.randint(stream(key, "random tokens"), chunks.shape, 0, self.model.vocab_size)
            replace = jax.random.bernoulli(stream(key, "random chunks"), self.terms.random_chunks, (chunks.shape[0], 1))
            chunks = jnp.where(replace, random, chunks)
        masked = jax.random.bernoulli(stream(key, "token dropout"), self.terms.token_dropout, chunks.shape)
        read = jnp.where(masked, self.mask_id, chunks)
        loss, terms = jnp.float32(0), {}
        for level in autoencoder.levels(read, chunks):
            of_level = stream(key, level.name) if level.name else key
            own, named = self._level(level, of_level)
            loss += level.weight * own
            terms |= {f"{level.name}_{name}" if level.name else name: value for name, value in named.items()}
        return loss, terms

    def _level(self, level: Level, key: PRNGKey) -> tuple[Float[Array, ""], Terms]:
        """Loss and metrics of one level."""
        autoencoder, posterior, chunks = level.autoencoder, level.posterior, level.chunks
        latents = posterior.sample(stream(key, "posterior"))
        kept = jax.random.bernoulli(stream(key, "latent dropout"), 1 - self.terms.latent_dropout, latents.shape)
        latents = jnp.where(kept, latents / (1 - self.terms.latent_dropout), 0.0)
        states = autoencoder.decode_states(latents).reshape(chunks.size, -1)
        weights = jnp.full((chunks.size,), 1.0 / chunks.size)
        nats = fused_cross_entropy(states, autoencoder.table, chunks.reshape(-1), weights, self.precision)
        kl = posterior.kl()
        clipped = clipped_kl(kl, self.terms.kl_clamp).mean()
        loss = autoencoder.config.chunk_size * nats + self.terms.kl_weight * clipped
        return loss, {"cross_entropy": nats, "kl": kl.sum(-1).mean(), "posterior_std": posterior.std.mean()}

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token."""
        return self.model.training_flops() / self.model.chunk_size


class TermInputs(NamedTuple):
    """Everything that the terms of stage 2 share in one step."""

    lm: LatentLM
    autoencoder: Autoencoder
    """frozen"""
    chunks: Int[Array, "B X K"]
    """X = N + 1: each but the first is a target, each but the last is read"""
    weights: Float[Array, "B N"]
    """weight of each target chunk in a mean; they sum to 1"""
    hidden: Float[Array, "B N D"]
    posterior: Posterior
    """of the target chunks; no gradient goes through it"""
    noise: Float[Array, "S B N E"]
    samples: Float[Array, "S B N Z"]
    """the head's samples, shared by all terms"""
    modules: dict[str, Any]
    """the modules that terms train beside the language model, by name"""
    key: PRNGKey

    @property
    def targets(self) -> Int[Array, "B N K"]:
        return self.chunks[:, 1:]

    def mean(self, of_position: Float[Array, "B N"]) -> Float[Array, ""]:
        """Weighted mean over the target chunks."""
        return (of_position * self.weights).sum()


class TermContext(NamedTuple):
    """The model that a term is part of the objective of."""

    model: LatentLMConfig
    autoencoder: AutoencoderConfig
    num_samples: int
    """S, samples of the head that are shared by the terms"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term(Registered, family="term"):
    """A term of the objective of stage 2. A new one overrides `values`, and what else differs from the defaults here."""

    weight: float = 1.0
    """factor of the term; 0 = it is measured and not trained"""
    from_step: int = 0
    """step before which the weight is 0"""
    decay_steps: int = 0
    """steps over which the weight falls linearly to 0; 0 = it stays"""

    trains_head: ClassVar[bool] = False
    """whether the term's gradient trains the head"""
    compares_latents: ClassVar[bool] = False
    """whether it reads the posterior of the target, which the frozen encoder has to compute"""

    def __post_init__(self) -> None:
        for name in ("weight", "from_step", "decay_steps"):
            if getattr(self, name) < 0:
                raise UsageError(f"loss: {self.kind}.{name} must not be negative, got {getattr(self, name)}")

    def weight_at(self, step: int | Int[Array, ""]) -> float | Float[Array, ""]:
        """The weight at a training step."""
        weight: Any = self.weight
        if self.decay_steps:
            weight = weight * jnp.clip(1 - jnp.asarray(step) / self.decay_steps, 0.0, 1.0)
        return jnp.where(jnp.asarray(step) >= self.from_step, weight, 0.0) if self.from_step else weight

    def check(self, context: TermContext) -> None:
        """Raises UsageError where the term does not fit the model."""

    def warnings(self, context: TermContext, trained: frozenset[str]) -> tuple[str, ...]:
        """Warnings about settings that are allowed and likely to go wrong; `trained` names the terms above weight 0."""
        return ()

    def modules(self, context: TermContext, precision: Precision) -> dict[str, Callable[[nnx.Rngs], nnx.Module]]:
        """Builders of the modules that only this term needs, by the name of their weights; inference drops them."""
        return {}

    def samples_needed(self, context: TermContext) -> int:
        """Number of samples of the head that the term reads."""
        return context.num_samples if self.trains_head else 0

    def flops(self, context: TermContext) -> int:
        """Forward FLOPs at one position, beside language model and samples."""
        return 0

    def values(self, inputs: TermInputs) -> dict[str, Array]:
        """The term under its own name, unweighted, and values to log beside it."""
        raise NotImplementedError


@Term.register("energy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class EnergyTerm(Term):
    """The energy score of the samples against the posterior of the next chunk: the paper's only term."""

    num_draws: int = 100
    """M, draws of the target, where the fidelity draws"""
    alpha: float = 1.0
    """exponent of the energy score, in (0, 2)"""
    fidelity: Fidelity = "second_order"

    trains_head: ClassVar[bool] = True
    compares_latents: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_draws < 1:
            raise UsageError(f"loss: energy.num_draws must be at least 1, got {self.num_draws}")
        if not 0 < self.alpha < 2:
            raise UsageError(f"loss: energy.alpha must lie in (0, 2), got {self.alpha}")

    def warnings(self, context: TermContext, trained: frozenset[str]) -> tuple[str, ...]:
        if not self.weight or self.alpha >= 1:
            return ()
        return (f"loss.terms.energy.alpha={self.alpha} is below 1: the score's slope grows without bound where samples meet",)

    def values(self, inputs: TermInputs) -> dict[str, Array]:
        sizes = dict(num_draws=self.num_draws, alpha=self.alpha, fidelity=self.fidelity)
        fidelity, diversity = energy_parts(inputs.samples, inputs.posterior, stream(inputs.key, "targets"), **sizes)
        return {
            "energy": inputs.mean(2 * fidelity - diversity),
            "fidelity": inputs.mean(fidelity),
            "diversity": inputs.mean(diversity),
            "fidelity_at": fidelity.mean(0),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentLossConfig:
    """The objective of stage 2: terms over one shared set of S samples. CALM has the energy alone."""

    num_samples: int = 8
    """S, samples of the head per position"""
    terms: dict[str, Term] = dataclasses.field(default_factory=lambda: FrozenDict(energy=EnergyTerm()))
    """the terms by name; each owns its weight"""

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise UsageError(f"loss: num_samples must be at least 2, got {self.num_samples}")
        order = {name: place for place, name in enumerate(Term.names())}
        ordered = sorted(self.terms.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
        if wrong := [name for name, term in ordered if name != term.kind]:
            raise UsageError(f"loss: terms.{wrong[0]} holds a term of kind {self.terms[wrong[0]].kind!r}")
        object.__setattr__(self, "terms", FrozenDict(ordered))

    @classmethod
    def of(cls, *terms: Term, num_samples: int = 8) -> "LatentLossConfig":
        """The objective of these terms."""
        return cls(num_samples=num_samples, terms=FrozenDict({term.kind: term for term in terms}))

    def with_terms(self, *terms: Term) -> "LatentLossConfig":
        """The same objective with these terms added, or in the place of those of their name."""
        return dataclasses.replace(self, terms=FrozenDict(self.terms | {term.kind: term for term in terms}))

    def without(self, *names: str) -> "LatentLossConfig":
        """The same objective without the terms of these names."""
        return dataclasses.replace(self, terms=FrozenDict({n: term for n, term in self.terms.items() if n not in names}))

    def weight(self, name: str) -> float:
        """The weight of a term; 0 where there is none."""
        return self.terms[name].weight if name in self.terms else 0.0


class LatentObjective:
    """Weighted terms over one set of samples, against the frozen autoencoder's posterior of the next chunk. Each is a mean over
    the chunks that count (`calm.core.response_mask`).

    The trained weights are a dictionary: `lm`, and the modules of single terms, which inference drops.
    """

    def __init__(
        self,
        model: LatentLMConfig,
        loss: LatentLossConfig,
        autoencoder: Autoencoder,
        *,
        context: int,
        precision: Precision = "float32",
    ):
        model.require_sizes_of(autoencoder.config)
        self.model, self.terms, self.precision, self.context = model, loss.terms, precision, context
        self.term_context = TermContext(model, autoencoder.config, loss.num_samples)
        for term in self.terms.values():
            term.check(self.term_context)
        if model.decoder_reads_latent and not any(term.weight and term.trains_head for term in self.terms.values()):
            raise UsageError(
                "loss: no term trains the head; add energy, own or likelihood to loss.terms, with a weight above 0"
            )
        if model.context_decoder is not None and not loss.weight("likelihood"):
            raise UsageError("loss.terms.likelihood must have a weight above 0: nothing else trains the context decoder")
        self.autoencoder_graphdef, self.frozen = nnx.split(autoencoder)
        self.graphdefs = {
            name: nnx.graphdef(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))))
            for name, build in self._builders().items()
        }

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings about settings that are allowed and likely to go wrong; printed when a run begins."""
        trained = frozenset(name for name, term in self.terms.items() if term.weight)
        return tuple(text for term in self.terms.values() for text in term.warnings(self.term_context, trained))

    @property
    def divergence_hint(self) -> str:
        """A setting of this objective that may explain a loss that is not finite."""
        energy: Any = self.terms.get("energy")
        return f"loss.terms.energy.alpha is {energy.alpha}; 1 is the safest" if energy is not None and energy.weight else ""

    def _builders(self) -> dict[str, Callable[[nnx.Rngs], nnx.Module]]:
        builders: dict[str, Any] = {"lm": lambda rngs: self.model.build(rngs=rngs, precision=self.precision)}
        for term in self.terms.values():
            builders |= term.modules(self.term_context, self.precision)
        return builders

    def init(self, key: PRNGKey) -> Any:
        return {name: nnx.state(build(nnx.Rngs(params=stream(key, name)))) for name, build in self._builders().items()}

    def module(self, params: Any) -> LatentLM:
        """The language model with these weights."""
        return nnx.merge(self.graphdefs["lm"], params["lm"])

    @property
    def samples_needed(self) -> int:
        """Number of samples of the head that a step draws."""
        return max((term.samples_needed(self.term_context) for term in self.terms.values()), default=0)

    def loss(
        self, params: Any, frozen: Any, tokens: Int[Array, "B T"], key: PRNGKey, step: int | Int[Array, ""] = 0
    ) -> tuple[Float[Array, ""], Terms]:
        """The sum of the weighted terms, and each of them unweighted, with their metrics."""
        inputs = self._inputs(params, frozen, tokens, key)
        loss, measured = jnp.float32(0), {}
        for name, term in self.terms.items():
            values = term.values(inputs)
            measured |= values
            if term.weight:
                loss += term.weight_at(step) * values[name]
        return loss, measured | inputs.lm.head.measures(inputs.hidden)

    def _inputs(self, params: Any, frozen: Any, tokens: Int[Array, "B T"], key: PRNGKey) -> TermInputs:
        lm = self.module(params)
        autoencoder = nnx.merge(self.autoencoder_graphdef, frozen)
        tokens, counted = split_mask(tokens)
        chunks, weights = as_chunks(tokens, self.model.chunk_size), target_weights(counted, self.model.chunk_size)
        posterior = jax.lax.stop_gradient(autoencoder.encode(chunks[:, 1:]))
        hidden, _ = lm.hidden(chunks[:, :-1], autoencoder=autoencoder)
        noise = samples = jnp.zeros((0, *posterior.mean.shape))
        if self.samples_needed:
            noise = lm.head.draw_noise(stream(key, "head"), (self.samples_needed, *hidden.shape[:-1]))
            samples = lm.head(hidden, noise)
        modules = {name: nnx.merge(self.graphdefs[name], params[name]) for name in params if name != "lm"}
        return TermInputs(lm, autoencoder, chunks, weights, hidden, posterior, noise, samples, modules, key)

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token of the trained parts, and the frozen encoder's forward pass."""
        trained = [term for term in self.terms.values() if term.weight]
        added = sum(term.flops(self.term_context) for term in trained)
        # The encoder runs for targets, where a term compares latents, and where the stem reads latents.
        encoded = any(term.compares_latents for term in trained) + (self.model.stem != "discrete")
        of_model = self.model.training_flops(self.context, self.samples_needed) + 3 * added
        return (of_model + encoded * self.term_context.autoencoder.encoder_flops()) / self.model.chunk_size
