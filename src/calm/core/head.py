"""Base of the heads: a model of the distribution of the next latent, given the hidden state.

B batch · N chunks · D model width · Z latent width · E noise width · S samples
"""

from typing import Any, ClassVar

from flax import nnx
from jaxtyping import Array, Float

from calm.core.dense import Precision
from calm.core.posterior import Posterior
from calm.registry import Registered
from calm.rng import PRNGKey


class HeadConfig(Registered, family="head"):
    """Base of the heads' configurations: frozen keyword-only dataclasses that validate in `__post_init__`."""

    has_own_loss: ClassVar[bool] = False
    """whether the head defines `loss`, and its configuration `loss_flops(dim, latent_dim)`"""

    mixes_noise: ClassVar[bool] = False
    """whether a sample is mixed with noise of width Z, which the head gives as `latent_noise(noise)`"""

    def build(self, dim: int, latent_dim: int, *, rngs: nnx.Rngs, precision: Precision = "float32") -> "Head":
        """The head, from hidden states of width `dim` to latents of width `latent_dim`."""
        raise NotImplementedError

    def flops(self, dim: int, latent_dim: int, num_samples: int) -> int:
        """Forward FLOPs of `num_samples` samples at one position."""
        raise NotImplementedError

    def loss_flops(self, dim: int, latent_dim: int) -> int:
        """Forward FLOPs of the head's own loss at one position, where it has one."""
        raise NotImplementedError


class Head(nnx.Module):
    """Base of the heads: (hidden, noise) -> latent, deterministic, with all randomness in the noise."""

    noise_dim: int
    """E"""

    def draw_noise(self, key: PRNGKey, shape: tuple[int, ...]) -> Float[Array, "*shape E"]:
        """Noise for samples of leading shape `shape`."""
        raise NotImplementedError

    def __call__(self, hidden: Float[Array, "*b D"], noise: Float[Array, "S *b E"]) -> Float[Array, "S *b Z"]:
        """One latent for each noise vector."""
        raise NotImplementedError

    def sample(self, key: PRNGKey, hidden: Float[Array, "*b D"], num_samples: int) -> Float[Array, "S *b Z"]:
        """S independent samples of the next latent at every position."""
        return self(hidden, self.draw_noise(key, (num_samples, *hidden.shape[:-1])))

    def loss(self, key: PRNGKey, hidden: Float[Array, "*b D"], posterior: Posterior) -> Float[Array, "*b"]:
        """The head's own loss against the posterior of the next chunk, per position; only where `has_own_loss`."""
        raise NotImplementedError

    def latent_noise(self, noise: Float[Array, "*b E"]) -> Float[Array, "*b Z"]:
        """The noise that is mixed into a sample; only where `mixes_noise`."""
        raise NotImplementedError

    def measures(self, hidden: Float[Array, "B N D"]) -> dict[str, Any]:
        """Values to log beside the loss."""
        return {}
