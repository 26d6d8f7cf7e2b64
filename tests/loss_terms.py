"""Objectives from flat weights, as short as tests want them: `loss(num_samples=3, auxiliary_weight=1.0)`."""

from typing import Any

from calm import config
from calm.core.objective import LatentLossConfig
from calm.runs import schema


def loss(head: str = "energy", **flat: Any) -> LatentLossConfig:
    """The terms that the flat weights of configuration schema 1 describe, beside a head of this kind."""
    return config.from_dict(LatentLossConfig, {"schema_version": 2, **schema.latent_loss(flat, head)})
