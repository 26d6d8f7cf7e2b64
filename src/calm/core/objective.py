"""What training minimises, for both stages: weighted terms, each logged under its own name."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.core import clipped_kl
from calm.core.autoencoder import Autoencoder, AutoencoderConfig, HierarchicalAutoencoder
from calm.core.cross_entropy import fused_cross_entropy
from calm.core.dense import Dense, Precision, dense_flops
from calm.core.energy_score import Fidelity, energy_parts
from calm.core.latent_lm import LatentLM, LatentLMConfig
from calm.core.latent_terms import gate_measures, head_loss, log_mean_nats, slot_energy
from calm.core.posterior import Posterior
from calm.core.response_mask import split_mask, target_weights
from calm.errors import UsageError
from calm.heads.chunk_predictor import ChunkPredictor
from calm.heads.direction import DirectionFrom, direction_loss
from calm.heads.gated import GatedEnergyHead, GatedEnergyHeadConfig
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
    lower_weight: float = 1.0
    """weight of the same loss on the lower level alone, where the model has one (model.lower_chunk_size)"""

    def __post_init__(self) -> None:
        for name in ("token_dropout", "latent_dropout", "random_chunks"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"autoencoder loss: {name} must lie in [0, 1), got {getattr(self, name)}")
        if min(self.kl_weight, self.kl_clamp, self.lower_weight) < 0:
            raise UsageError("autoencoder loss: kl_weight, kl_clamp and lower_weight must not be negative")


class AutoencoderObjective:
    """K * cross-entropy + kl_weight * clipped KL, averaged over chunks.

    Of two levels the lower one has the same loss on the parts of the chunk, decoded without the upper one: so that both are
    codes from which the text comes back, and the lower one's latents bear noise too.
    """

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
        if not isinstance(autoencoder, HierarchicalAutoencoder):
            return self._level(autoencoder, autoencoder.encode(read), chunks, key)
        lower = autoencoder.encode_lower(read)
        loss, terms = self._level(autoencoder, autoencoder.encode_upper(lower), chunks, key)
        if self.terms.lower_weight:
            parts = chunks.reshape(*lower.mean.shape[:-1], -1)
            own, of_lower = self._level(autoencoder.lower, lower, parts, stream(key, "lower"))
            loss += self.terms.lower_weight * parts.shape[1] * own
            terms |= {f"lower_{name}": value for name, value in of_lower.items()}
        return loss, terms

    def _level(
        self, autoencoder: Autoencoder, posterior: Posterior, chunks: Int[Array, "*b K"], key: PRNGKey
    ) -> tuple[Float[Array, ""], Terms]:
        """The loss of one level, from its posterior."""
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
        """Forward and backward FLOPs per token; the backward pass counts twice the forward."""
        model = self.model
        chunk = model.encoder_flops() + model.decoder_flops() + model.vocabulary_flops()
        if model.lower is not None and self.terms.lower_weight:
            chunk += model.places * model.lower.decoder_flops() + model.vocabulary_flops()
        return 3 * chunk / model.chunk_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentLossConfig:
    """Terms of stage 2, over one shared set of S samples. A term of weight 0 costs nothing.

    CALM has the energy alone; the others are what a small model may need beside it, or instead (docs/log.md says which).
    """

    num_samples: int = 8
    """S, samples of the head per position"""
    num_draws: int = 100
    """M, draws of the target, where the fidelity draws"""
    alpha: float = 1.0
    """exponent of the energy score, in (0, 2)"""
    fidelity: Fidelity = "second_order"
    energy_weight: float = 1.0
    """weight of the energy score, the paper's only term"""
    energy_from_step: int = 0
    """step before which the energy term is off, so that the other terms train the backbone first"""
    own_weight: float = 1.0
    """weight of the head's own loss, for a head that has one (flow matching, diffusion, mixture)"""
    auxiliary_weight: float = 0.0
    """weight of the auxiliary K-token cross-entropy from the hidden state (calm.heads.ChunkPredictor)"""
    auxiliary_decay_steps: int = 0
    """steps over which that weight falls linearly to 0; 0 = it stays"""
    anchor_weight: float = 0.0
    """weight of the squared error, summed over Z, of a linear map from the hidden state to the next posterior mean"""
    likelihood_weight: float = 0.0
    """weight of -log mean_s p(chunk | latent s), by the context decoder where there is one, else by the frozen autoencoder; per
    token. Its samples want drawn decoding"""
    likelihood_samples: int = 4
    """how many of the S samples that mean is over"""
    slot_energy_weight: float = 0.0
    """weight of an energy score for each token slot, in the autoencoder's hidden states before the logits"""
    direction_weight: float = 0.0
    """weight of 1 - cos between predicted and true displacement, to the next posterior mean (calm.heads.direction)"""
    direction_from: DirectionFrom = "previous"
    """what displacements start at: the posterior mean of the chunk before, or the noise of a gated head"""

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise UsageError(f"loss: num_samples must be at least 2, got {self.num_samples}")
        if self.num_draws < 1:
            raise UsageError(f"loss: num_draws must be at least 1, got {self.num_draws}")
        if not 0 < self.alpha < 2:
            raise UsageError(f"loss: alpha must lie in (0, 2), got {self.alpha}")
        weights = (
            "energy_weight",
            "own_weight",
            "auxiliary_weight",
            "anchor_weight",
            "likelihood_weight",
            "slot_energy_weight",
            "direction_weight",
        )
        for name in (*weights, "auxiliary_decay_steps", "energy_from_step"):
            if getattr(self, name) < 0:
                raise UsageError(f"loss: {name} must not be negative, got {getattr(self, name)}")
        if self.likelihood_weight and not 1 <= self.likelihood_samples <= self.num_samples:
            raise UsageError(f"loss: likelihood_samples must lie in 1..num_samples={self.num_samples}")

    def auxiliary_weight_at(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """The auxiliary term's weight at a step."""
        if not self.auxiliary_decay_steps:
            return jnp.float32(self.auxiliary_weight)
        return self.auxiliary_weight * jnp.clip(1 - jnp.asarray(step) / self.auxiliary_decay_steps, 0.0, 1.0)

    def energy_weight_at(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """The energy term's weight at a step."""
        return jnp.where(jnp.asarray(step) >= self.energy_from_step, self.energy_weight, 0.0)


class LatentObjective:
    """Weighted terms over one set of samples, against the frozen autoencoder's posterior of the next chunk. Each is a mean over
    the chunks that count (`calm.core.response_mask`).

    The trained weights are a dictionary: `lm`, and what only a term needs (`auxiliary`, `anchor`), which inference drops.
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
        self.model, self.terms, self.precision, self.context = model, loss, precision, context
        self.autoencoder = autoencoder.config
        for name in ("vocab_size", "chunk_size", "latent_dim"):
            if getattr(model, name) != getattr(autoencoder.config, name):
                theirs = getattr(autoencoder.config, name)
                raise UsageError(f"{name}={getattr(model, name)} of the LM does not match the autoencoder's {theirs}")
        self.has_own_loss = hasattr(model.head, "loss_flops")
        self._check_terms()
        self.autoencoder_graphdef, self.frozen = nnx.split(autoencoder)
        self.graphdefs = {
            name: nnx.graphdef(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))))
            for name, build in self._builders().items()
        }

    def _check_terms(self) -> None:
        loss, writer = self.terms, self.model.context_decoder
        if writer is not None and not loss.likelihood_weight:
            raise UsageError("loss.likelihood_weight must be above 0: nothing else trains the context decoder")
        if loss.direction_weight and loss.direction_from == "noise" and not isinstance(self.model.head, GatedEnergyHeadConfig):
            raise UsageError('loss.direction_from="noise" needs a head of kind GatedEnergyHeadConfig; others take "previous"')
        by_samples = loss.energy_weight or loss.slot_energy_weight or loss.direction_weight
        head_trains = by_samples or (self.has_own_loss and loss.own_weight)
        by_likelihood = loss.likelihood_weight and (writer is None or writer.use_latent)
        if not head_trains and not by_likelihood and (writer is None or writer.use_latent):
            raise UsageError("loss: no term trains the head; raise energy_weight, own_weight or likelihood_weight")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is allowed and likely to go wrong, in words; said when a run begins."""
        said, loss = [], self.terms
        if loss.energy_weight and loss.alpha < 1:
            said.append(f"loss.alpha={loss.alpha} is below 1: the score's slope grows without bound where samples meet")
        if loss.direction_weight and not (loss.energy_weight or loss.likelihood_weight):
            said.append("loss.direction_weight without energy_weight turns latents and leaves their length free")
        return tuple(said)

    @property
    def divergence_hint(self) -> str:
        """What of this objective may be behind a loss that stopped being finite."""
        return f"loss.alpha is {self.terms.alpha}; 1 is the safest" if self.terms.energy_weight else ""

    def _builders(self) -> dict[str, Any]:
        builders: dict[str, Any] = {"lm": lambda rngs: self.model.build(rngs=rngs, precision=self.precision)}
        dim = self.model.backbone.dim
        if self.terms.auxiliary_weight:
            sizes = (dim, self.model.chunk_size, self.autoencoder.dim)
            builders["auxiliary"] = lambda rngs: ChunkPredictor(*sizes, precision=self.precision, rngs=rngs)
        if self.terms.anchor_weight:
            builders["anchor"] = lambda rngs: Dense(
                dim, self.model.latent_dim, use_bias=True, precision=self.precision, rngs=rngs
            )
        return builders

    def init(self, key: PRNGKey) -> Any:
        return {name: nnx.state(build(nnx.Rngs(params=stream(key, name)))) for name, build in self._builders().items()}

    def module(self, params: Any) -> LatentLM:
        """The language model with these weights."""
        return nnx.merge(self.graphdefs["lm"], params["lm"])

    @property
    def samples_needed(self) -> int:
        """How many samples of the head a step draws."""
        writer, loss = self.model.context_decoder, self.terms
        if loss.energy_weight or loss.slot_energy_weight or loss.direction_weight:
            return loss.num_samples
        return loss.likelihood_samples if loss.likelihood_weight and (writer is None or writer.use_latent) else 0

    def loss(
        self, params: Any, frozen: Any, tokens: Int[Array, "B T"], key: PRNGKey, step: int | Int[Array, ""] = 0
    ) -> tuple[Float[Array, ""], Terms]:
        lm, weigh = self.module(params), self.terms
        autoencoder = nnx.merge(self.autoencoder_graphdef, frozen)
        tokens, counted = split_mask(tokens)
        chunks, weights = as_chunks(tokens, self.model.chunk_size), target_weights(counted, self.model.chunk_size)
        targets = chunks[:, 1:]

        def mean(of_position: Float[Array, "B N"]) -> Float[Array, ""]:
            return (of_position * weights).sum()

        posterior = jax.lax.stop_gradient(autoencoder.encode(targets))
        hidden, _ = lm.hidden(chunks[:, :-1], autoencoder=autoencoder)
        terms: Terms = {}
        loss = jnp.float32(0)
        samples = noise = jnp.zeros((0, *posterior.mean.shape))
        if self.samples_needed:
            noise = lm.head.draw_noise(stream(key, "head"), (self.samples_needed, *hidden.shape[:-1]))
            samples = lm.head(hidden, noise)
        if weigh.energy_weight or weigh.direction_weight:  # beside a direction term alone it is measured
            sizes = dict(num_draws=weigh.num_draws, alpha=weigh.alpha, fidelity=weigh.fidelity)
            fidelity, diversity = energy_parts(samples, posterior, stream(key, "targets"), **sizes)
            terms |= {"fidelity": mean(fidelity), "diversity": mean(diversity), "fidelity_at": fidelity.mean(0)}
            terms["energy"] = mean(2 * fidelity - diversity)
            loss += weigh.energy_weight_at(step) * terms["energy"] if weigh.energy_weight else 0
            if weigh.direction_weight or isinstance(lm.head, GatedEnergyHead):  # beside a gate it is measured
                origin = self._origin(autoencoder, lm, noise, chunks, posterior.mean)
                terms["direction"] = mean(direction_loss(samples, posterior.mean, origin))
            loss += weigh.direction_weight * terms["direction"] if weigh.direction_weight else 0
        if self.has_own_loss and weigh.own_weight:
            terms["own"] = mean(head_loss(lm.head)(stream(key, "own"), hidden, posterior))
            loss += weigh.own_weight * terms["own"]
        if weigh.auxiliary_weight:
            auxiliary = nnx.merge(self.graphdefs["auxiliary"], params["auxiliary"])
            terms["auxiliary"] = auxiliary.loss(hidden, targets, jax.lax.stop_gradient(autoencoder.table), weights)
            loss += weigh.auxiliary_weight_at(step) * terms["auxiliary"]
        if weigh.anchor_weight:
            anchor = nnx.merge(self.graphdefs["anchor"], params["anchor"])
            terms["anchor"] = mean(jnp.square(anchor(hidden) - posterior.mean).sum(-1))
            loss += weigh.anchor_weight * terms["anchor"]
        if weigh.slot_energy_weight:
            latents = posterior.sample(stream(key, "slots"))
            terms["slot_energy"] = mean(slot_energy(autoencoder, samples, latents, weigh.alpha))
            loss += weigh.slot_energy_weight * terms["slot_energy"]
        if weigh.likelihood_weight:
            some = samples[: weigh.likelihood_samples]
            terms["likelihood"] = self._likelihood(autoencoder, lm, hidden, some, chunks, weights)
            loss += weigh.likelihood_weight * terms["likelihood"]
        return loss, terms | gate_measures(lm.head, hidden)

    def _origin(
        self, autoencoder: Autoencoder, lm: LatentLM, noise: Array, chunks: Int[Array, "B M K"], target: Float[Array, "B N Z"]
    ) -> Float[Array, "*s B N Z"]:
        """Where displacements start: the noise of each sample, or the mean of the chunk before each target."""
        if self.terms.direction_from == "noise":
            assert isinstance(lm.head, GatedEnergyHead)
            return lm.head.latent_noise(noise)
        first = jax.lax.stop_gradient(autoencoder.encode(chunks[:, :1]).mean)
        return jnp.concatenate([first, target[:, :-1]], axis=1)

    def _likelihood(
        self,
        autoencoder: Autoencoder,
        lm: LatentLM,
        hidden: Float[Array, "B N D"],
        samples: Float[Array, "S B N Z"],
        chunks: Int[Array, "B M K"],
        weights: Float[Array, "B N"],
    ) -> Float[Array, ""]:
        """-log mean_s p(chunk | latent s) per token."""
        writer, targets = lm.context_decoder, chunks[:, 1:]
        if writer is None:
            states, table = autoencoder.decode_states(samples), jax.lax.stop_gradient(autoencoder.table)
        else:
            plan = writer.plan(hidden, samples if writer.config.use_latent else None)
            states = writer.over_text(plan, chunks)
            table = writer.table
        return log_mean_nats(states, table, targets, self.precision, weights, table_gradient=writer is not None)

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token of the trained parts, and the frozen encoder's forward pass."""
        model, table, weigh = self.model, self.autoencoder, self.terms
        added = 0  # by the terms, forward, at one position
        if self.has_own_loss and weigh.own_weight:
            head: Any = model.head
            added += head.loss_flops(model.backbone.dim, model.latent_dim)
        if weigh.auxiliary_weight:
            added += dense_flops(model.backbone.dim, model.chunk_size * table.dim) + table.vocabulary_flops()
        if weigh.anchor_weight:
            added += dense_flops(model.backbone.dim, model.latent_dim)
        if weigh.slot_energy_weight:
            added += (weigh.num_samples + 1) * table.decoder_flops()
        if weigh.likelihood_weight:
            count = weigh.likelihood_samples
            if model.context_decoder is None:
                added += count * (table.decoder_flops() + table.vocabulary_flops())
            else:
                added += model.writing_flops(count if model.context_decoder.use_latent else 1)
        # As a target, where a term has one, and where the stem reads latents.
        by_samples = weigh.energy_weight or weigh.slot_energy_weight or weigh.direction_weight
        aims = by_samples or weigh.anchor_weight or (self.has_own_loss and weigh.own_weight)
        encoded = bool(aims) + (model.stem != "discrete")
        trained = model.training_flops(self.context, self.samples_needed) + 3 * added
        return (trained + encoded * table.encoder_flops()) / model.chunk_size
