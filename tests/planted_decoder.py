"""The frozen decoder around a planted autoencoder, which is no `Autoencoder`."""

from typing import Any

from calm.core.chunk_decoder import FrozenDecoder


class PlantedDecoder(FrozenDecoder):
    """`FrozenDecoder` without its check of the autoencoder's type."""

    def __init__(self, autoencoder: Any):
        object.__setattr__(self, "autoencoder", autoencoder)
