"""Hidden state to samples of the next latent."""

from calm.heads.chunk_predictor import ChunkPredictor as ChunkPredictor
from calm.heads.energy import EnergyHead as EnergyHead
from calm.heads.energy import EnergyHeadConfig as EnergyHeadConfig
