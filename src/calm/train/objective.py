"""What training minimises, for both stages: weighted terms, each logged under its own name."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm.autoencoder import Autoencoder, AutoencoderConfig
from calm.errors import UsageError
from calm.heads import ChunkPredictor
from calm.losses import Fidelity, clipped_kl, energy_loss, fused_cross_entropy
from calm.models import LatentLM, LatentLMConfig
from calm.nn.dense import Precision, dense_flops
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
    """nats per dimension below which the KL term has no gradient"""
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
    """K * cross-entropy + kl_weight * clipped KL, averaged over chunks."""

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
        chunks = as_chunks(tokens, self.model.chunk_size).reshape(-1, self.model.chunk_size)
        if self.terms.random_chunks:
            random = jax.random.randint(stream(key, "random tokens"), chunks.shape, 0, self.model.vocab_size)
            replace = jax.random.bernoulli(stream(key, "random chunks"), self.terms.random_chunks, (chunks.shape[0], 1))
            chunks = jnp.where(replace, random, chunks)
        masked = jax.random.bernoulli(stream(key, "token dropout"), self.terms.token_dropout, chunks.shape)
        posterior = autoencoder.encode(jnp.where(masked, self.mask_id, chunks))
        latents = posterior.sample(stream(key, "posterior"))
        kept = jax.random.bernoulli(stream(key, "latent dropout"), 1 - self.terms.latent_dropout, latents.shape)
        latents = jnp.where(kept, latents / (1 - self.terms.latent_dropout), 0.0)
        states = autoencoder.decode_states(latents).reshape(chunks.size, -1)
        weights = jnp.full((chunks.size,), 1.0 / chunks.size)
        nats = fused_cross_entropy(states, autoencoder.table, chunks.reshape(-1), weights, self.precision)
        kl = posterior.kl()
        clipped = clipped_kl(kl, self.terms.kl_clamp).mean()
        loss = self.model.chunk_size * nats + self.terms.kl_weight * clipped
        return loss, {"cross_entropy": nats, "kl": kl.sum(-1).mean(), "posterior_std": posterior.std.mean()}

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token; the backward pass counts twice the forward."""
        model = self.model
        return 3 * (model.encoder_flops() + model.decoder_flops() + model.vocabulary_flops()) / model.chunk_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentLossConfig:
    """Terms of stage 2, over one shared set of S samples."""

    num_samples: int = 8
    """S, samples of the head per position"""
    num_draws: int = 100
    """M, draws of the target, where the fidelity draws"""
    alpha: float = 1.0
    """exponent of the energy score, in (0, 2)"""
    fidelity: Fidelity = "second_order"
    energy_weight: float = 1.0
    auxiliary_weight: float = 0.0
    """weight of the auxiliary K-token cross-entropy from the hidden state (calm.heads.ChunkPredictor)"""
    auxiliary_decay_steps: int = 0
    """steps over which that weight falls linearly to 0; 0 = it stays"""

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise UsageError(f"loss: num_samples must be at least 2, got {self.num_samples}")
        if self.num_draws < 1:
            raise UsageError(f"loss: num_draws must be at least 1, got {self.num_draws}")
        if not 0 < self.alpha < 2:
            raise UsageError(f"loss: alpha must lie in (0, 2), got {self.alpha}")
        if min(self.energy_weight, self.auxiliary_weight, self.auxiliary_decay_steps) < 0:
            raise UsageError("loss: weights and auxiliary_decay_steps must not be negative")

    def auxiliary_weight_at(self, step: int | Int[Array, ""]) -> Float[Array, ""]:
        """The auxiliary term's weight at a step."""
        if not self.auxiliary_decay_steps:
            return jnp.float32(self.auxiliary_weight)
        return self.auxiliary_weight * jnp.clip(1 - jnp.asarray(step) / self.auxiliary_decay_steps, 0.0, 1.0)


class LatentObjective:
    """The energy loss against the frozen autoencoder's posterior, and the auxiliary cross-entropy.

    The trained weights are a dictionary: `lm`, and `auxiliary` where that term is on, which inference drops.
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
        self.autoencoder_graphdef, self.frozen = nnx.split(autoencoder)
        self.graphdefs = {
            name: nnx.graphdef(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))))
            for name, build in self._builders().items()
        }

    def _builders(self) -> dict[str, Any]:
        builders: dict[str, Any] = {"lm": lambda rngs: self.model.build(rngs=rngs, precision=self.precision)}
        if self.terms.auxiliary_weight:
            sizes = (self.model.backbone.dim, self.model.chunk_size, self.autoencoder.dim)
            builders["auxiliary"] = lambda rngs: ChunkPredictor(*sizes, precision=self.precision, rngs=rngs)
        return builders

    def init(self, key: PRNGKey) -> Any:
        return {name: nnx.state(build(nnx.Rngs(params=stream(key, name)))) for name, build in self._builders().items()}

    def module(self, params: Any) -> LatentLM:
        """The language model with these weights."""
        return nnx.merge(self.graphdefs["lm"], params["lm"])

    def loss(
        self, params: Any, frozen: Any, tokens: Int[Array, "B T"], key: PRNGKey, step: int | Int[Array, ""] = 0
    ) -> tuple[Float[Array, ""], Terms]:
        lm = self.module(params)
        autoencoder = nnx.merge(self.autoencoder_graphdef, frozen)
        chunks = as_chunks(tokens, self.model.chunk_size)
        targets = chunks[:, 1:]
        posterior = jax.lax.stop_gradient(autoencoder.encode(targets))
        hidden, _ = lm.hidden(chunks[:, :-1])
        samples = lm.sample(stream(key, "head"), hidden, self.terms.num_samples)
        energy = energy_loss(
            samples,
            posterior,
            stream(key, "targets"),
            num_draws=self.terms.num_draws,
            alpha=self.terms.alpha,
            fidelity=self.terms.fidelity,
        ).mean()
        loss, terms = self.terms.energy_weight * energy, {"energy": energy}
        if self.terms.auxiliary_weight:
            auxiliary = nnx.merge(self.graphdefs["auxiliary"], params["auxiliary"])
            terms["auxiliary"] = auxiliary.loss(hidden, targets, jax.lax.stop_gradient(autoencoder.table))
            loss = loss + self.terms.auxiliary_weight_at(step) * terms["auxiliary"]
        return loss, terms

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs per token of the trained parts, and the frozen encoder's forward pass."""
        model, table = self.model, self.autoencoder
        position = model.flops(self.context, self.terms.num_samples)
        if self.terms.auxiliary_weight:
            position += dense_flops(model.backbone.dim, model.chunk_size * table.dim) + table.vocabulary_flops()
        return (3 * position + table.encoder_flops()) / model.chunk_size
