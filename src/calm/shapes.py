"""Axis letters, written once. Annotations, einsum strings and docstrings use these and no others.

    B batch                         N chunks in a sequence (paper: L)     Z latent width (paper: l)
    T tokens                        K tokens in a chunk                   D model width (paper: d)
    V vocabulary                    S samples of the model (paper: N)     M draws of the target
    H attention heads               G key-value heads                     E noise width of the head
    C width of one attention head   I inner width of an MLP               R rows: all leading axes flattened
    P parts of a chunk              Y latent width of a part              (of a hierarchical autoencoder)

`*b` stands for any leading axes. The paper is CALM, arXiv:2510.27688; its letters clash (N samples, L chunks, l latent width).
"""

from jax import Array
from jaxtyping import Bool, Float, Int

Tokens = Int[Array, "B T"]
Chunks = Int[Array, "B N K"]
Latents = Float[Array, "B N Z"]
Hidden = Float[Array, "B N D"]
Samples = Float[Array, "S B N Z"]
Mask = Bool[Array, "B N"]
