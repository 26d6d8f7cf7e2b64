"""The interface of an encoder's posterior, the distribution of a chunk's latent, and the family of its kinds."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from calm.registry import Registered
from calm.rng import PRNGKey


@runtime_checkable
class Posterior(Protocol):
    """A distribution over latents `[*b Z]`, a NamedTuple of arrays.

    It has `mean` and `std` (of a draw, per dimension), and for the energy score `shared_noise`, `squared_distances` and
    `squared_distance_moments`. `kl` and `log_prob` give one value per dimension; their sum is the chunk's. The class has
    `outputs(Z)`, the number of values that describe one, `of(outputs)`, which makes one of a network's outputs, and
    `onto(latents)`, which maps any vector to where latents of this kind lie.
    """

    @property
    def mean(self) -> Float[Array, "*b Z"]: ...

    @property
    def std(self) -> Float[Array, "*b Z"]: ...

    def sample(self, key: PRNGKey) -> Float[Array, "*b Z"]: ...

    def draws(self, key: PRNGKey, count: int) -> Float[Array, "M *b Z"]: ...

    def kl(self) -> Float[Array, "*b Z"]: ...

    def log_prob(self, latents: Float[Array, "*b Z"]) -> Float[Array, "*b Z"]: ...

    def shared_noise(self, key: PRNGKey, count: int) -> Any: ...

    def squared_distances(self, points: Float[Array, "S R Z"], noise: Any) -> Float[Array, "S R M"]: ...

    def squared_distance_moments(self, points: Float[Array, "S R Z"]) -> tuple[Float[Array, "S R"], Float[Array, "S R"]]: ...


class Posteriors(Registered, family="posterior"):
    """The kinds of posterior, by name: `Posteriors.member("gaussian")`."""


def posterior_class(kind: str) -> Any:
    """The class of a kind of posterior. Raises UsageError for an unknown kind."""
    return Posteriors.member(kind)
