"""Counts the FLOPs of matrix products in a traced program, through scans and calls."""

import math
from collections.abc import Callable
from typing import Any

import jax


def matmul_flops(function: Callable, *arguments: Any) -> int:
    """2 * multiplications of every product in `function(*arguments)`; arguments may be shapes."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        inner = [value for name, value in equation.params.items() if name in ("jaxpr", "call_jaxpr", "fun_jaxpr")]
        total += sum(repeats * _count(getattr(value, "jaxpr", value)) for value in inner)
    return total
