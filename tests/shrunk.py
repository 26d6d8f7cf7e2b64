"""Presets with every width and count cut down, so that a test can build them all; what makes them differ stays."""

import dataclasses
from typing import Any

from calm.config import FrozenDict

SIZES = dict(vocab_size=11, chunk_size=4, latent_dim=8)
MOST = {
    "dim": 16,
    "inner_dim": 12,
    "table_dim": 8,
    "num_layers": 4,
    "num_heads": 2,
    "num_kv_heads": 2,
    "num_slots": 6,
    "state_dim": 4,
    "noise_dim": 5,
    "num_components": 3,
    "num_steps": 3,
    "num_draws": 2,
    "recall": 8,
}


def shrunk(config: Any) -> Any:
    """A model's configuration with the numbers in `MOST` as upper bounds, and the sizes in `SIZES` where it has them."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = shrunk(value)
        elif isinstance(value, FrozenDict):
            changes[field.name] = FrozenDict({key: shrunk(item) for key, item in value.items()})
        elif field.name in SIZES:
            changes[field.name] = SIZES[field.name]
        elif field.name in MOST and isinstance(value, int):
            changes[field.name] = min(value, MOST[field.name])
    return dataclasses.replace(config, **changes)
