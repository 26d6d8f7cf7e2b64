"""An energy score for every token slot of a chunk, in the hidden states of the frozen autoencoder's decoder."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from calm.core.autoencoder import Autoencoder
from calm.core.energy_score import distance, diversity
from calm.core.objective import Term, TermContext, TermInputs
from calm.errors import UsageError
from calm.rng import stream


def slot_energy(
    autoencoder: Autoencoder, samples: Float[Array, "S *b Z"], target: Float[Array, "*b Z"], alpha: float
) -> Float[Array, "*b"]:
    """The energy loss of every token slot in the decoder's hidden states, against one draw of the target; summed over slots.

    A latent's energy score sees a chunk as one point; here each token has its own distance.
    """
    states = autoencoder.decode_states(samples)
    truth = autoencoder.decode_states(target)
    flat = states.reshape(len(states), -1, states.shape[-1])
    fidelity = distance(jnp.square(flat - truth.reshape(1, *flat.shape[1:])).sum(-1), alpha).mean(0)
    return (2 * fidelity - diversity(flat, alpha)).reshape(states.shape[1:-1]).sum(-1)


@Term.register("slot_energy")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotEnergyTerm(Term):
    """The energy score of each token slot; not in the paper."""

    alpha: float = 1.0
    """exponent of the score, in (0, 2)"""

    trains_head: ClassVar[bool] = True
    compares_latents: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha < 2:
            raise UsageError(f"loss: slot_energy.alpha must lie in (0, 2), got {self.alpha}")

    def flops(self, context: TermContext) -> int:
        return (context.num_samples + 1) * context.autoencoder.decoder_flops()

    def values(self, inputs: TermInputs) -> dict[str, Array]:
        latents = inputs.posterior.sample(stream(inputs.key, "slots"))
        return {"slot_energy": inputs.mean(slot_energy(inputs.autoencoder, inputs.samples, latents, self.alpha))}
