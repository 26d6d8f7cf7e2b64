"""Axis letters. Annotations, einsum strings and docstrings use these, and letters that the docstring of their file explains.

    B batch                         N chunks in a sequence (paper: L)     Z latent width (paper: l)
    T tokens                        K tokens in a chunk                   D model width (paper: d)
    V vocabulary                    S samples of the model (paper: N)     M draws of the target
    H attention heads               G key-value heads                     E noise width of the head
    C width of one attention head   I inner width of an MLP               R rows: all leading axes flattened
    P parts of a chunk, or paths    Y latent width of a part              W width of a token table
    A places at which something is  O orders of n-grams                   F measured values of a block
      asked, in ascending order     Q queries, or blocks to calibrate on  U units that a bootstrap resamples
    J gates of a recurrent unit     X an axis of this annotation alone

`*b` stands for any leading axes. The paper is CALM, arXiv:2510.27688; its letters clash (N samples, L chunks, l latent width).
`tests/test_structure.py` holds annotations against this list.
"""
