"""Label smoothing: the target is right with probability 1 - e, and any id of the vocabulary, evenly, with probability e.

Szegedy et al. 2015, arXiv:1512.00567. With logits l = h . table and mean logit l_m, the cross-entropy against that target is

    log Z - (1 - e) l_y - e l_m  =  cross-entropy + e (l_y - l_m),

so beside the cross-entropy it costs one product with the table's mean row. Its minimum is above 0 and its best distribution
keeps e / V for every id: likelihoods of a model trained so are worse by construction, and it is scored without it.
"""

from jaxtyping import Array, Float, Int


def smoothing_term(hidden: Float[Array, "R D"], table: Float[Array, "V D"], targets: Int[Array, "R"]) -> Float[Array, "R"]:
    """l_y - l_m of every row: e times this is added to the cross-entropy."""
    return (hidden * (table[targets] - table.mean(0))).sum(-1)
