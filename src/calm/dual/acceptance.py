"""Which drafts are kept, and the token that follows them: two rules under which the text has the token model's law."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from calm.token.softmax_head import draw_places


def keep_matching(
    drafts: Int[Array, "K"], proposed: Int[Array, ""], target: Float[Array, "K+1 V"], choice: Float[Array, "K+1 2"]
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many of the first `proposed` drafts equal the draws of the token model, and its token behind them.

    `target` are its laws, up to a factor. What is kept is its own draw at every place, whatever was proposed.
    """
    own = draw_places(choice[:, None], target)[:, 0]
    right = (drafts == own[:-1]) & (jnp.arange(len(drafts)) < proposed)
    kept = jnp.cumprod(right.astype(jnp.int32)).sum()
    return kept, own[kept]


def accept_or_resample(
    drafts: Int[Array, "K"],
    proposed: Int[Array, ""],
    laws: Float[Array, "K V"],
    target: Float[Array, "K+1 V"],
    accept: Float[Array, "K+1"],
    choice: Float[Array, "K+1 2"],
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """How many of the first `proposed` drafts are kept, and the token behind them.

    Draft x at a place with law q, drawn from it, is kept with probability min(1, p(x)/q(x)); at the first that is not, a token
    is drawn from (p - q)+; behind the last one from p. Then every place has the law p: min(p, q) + (1 - sum min(p, q)) (p - q)+
    / sum (p - q)+ = p. It holds given anything that q and p were made of, if x, the coin and the token drawn instead are not.
    `laws` and `target` are probabilities.
    """
    count = jnp.arange(len(drafts))
    p, q = target[count, drafts], laws[count, drafts]
    right = (accept[:-1] * q < p) & (count < proposed)
    kept = jnp.cumprod(right.astype(jnp.int32)).sum()
    here = target[kept]
    rest = jnp.where(kept < proposed, jnp.maximum(here - laws[jnp.minimum(kept, len(drafts) - 1)], 0.0), here)
    # p = q up to rounding leaves nothing to draw from, and no rejection but by rounding
    rest = jnp.where(rest.sum() > 0, rest, here)
    return kept, draw_places(choice[kept][None, None], rest[None])[0, 0]
