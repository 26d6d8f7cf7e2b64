"""What the encoder says of a chunk: the law of its latent.

Every law answers to the same names, so that what takes one takes any: `mean` and `std` (of a draw, per dimension), `sample`,
`draws`, `kl` and `log_prob` (one value per dimension; their sum is the chunk's), and what the energy score asks of its target,
`shared_noise`, `squared_distances` and `squared_distance_moments`. `of` makes one of a network's outputs, `onto` brings any
vector to where its latents lie.
"""

from typing import Literal

from calm.core.gaussian import Gaussian as Gaussian
from calm.posteriors.power_spherical import PowerSpherical as PowerSpherical

Posterior = Gaussian | PowerSpherical
PosteriorKind = Literal["gaussian", "power_spherical"]
POSTERIORS: dict[PosteriorKind, type[Posterior]] = {"gaussian": Gaussian, "power_spherical": PowerSpherical}
