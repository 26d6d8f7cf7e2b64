"""Hidden state to samples of the next latent."""

from calm.heads.chunk_predictor import ChunkPredictor as ChunkPredictor
from calm.heads.diffusion import DiffusionHead as DiffusionHead
from calm.heads.diffusion import DiffusionHeadConfig as DiffusionHeadConfig
from calm.heads.energy import EnergyHead as EnergyHead
from calm.heads.energy import EnergyHeadConfig as EnergyHeadConfig
from calm.heads.flow_matching import FlowHead as FlowHead
from calm.heads.flow_matching import FlowHeadConfig as FlowHeadConfig
from calm.heads.gated_energy import GatedEnergyHead as GatedEnergyHead
from calm.heads.gated_energy import GatedEnergyHeadConfig as GatedEnergyHeadConfig
from calm.heads.mixture import MixtureHead as MixtureHead
from calm.heads.mixture import MixtureHeadConfig as MixtureHeadConfig

HeadConfig = EnergyHeadConfig | FlowHeadConfig | DiffusionHeadConfig | MixtureHeadConfig | GatedEnergyHeadConfig
