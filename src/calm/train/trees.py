"""Names of the leaves of a pytree: what rules, checkpoints and messages speak of."""

from typing import Any

import jax


def leaf_name(path: tuple[Any, ...]) -> str:
    """`blocks.layer.attention.kernel`; the `value` under which nnx keeps a variable's array is left out."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaf name -> leaf, in the order of `jax.tree.leaves`."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def map_named(function: Any, tree: Any) -> Any:
    """`function(name, leaf)` over a pytree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(leaf_name(path), leaf), tree)
