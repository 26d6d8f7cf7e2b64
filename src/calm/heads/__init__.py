"""Heads beside the paper's energy head: other models of the distribution of the next latent, and losses on its samples."""

from calm.core.energy_head import EnergyHeadConfig
from calm.heads.diffusion import DiffusionHeadConfig
from calm.heads.flow import FlowHeadConfig
from calm.heads.gated import GatedEnergyHeadConfig
from calm.heads.mixture import MixtureHeadConfig

HeadConfig = EnergyHeadConfig | FlowHeadConfig | DiffusionHeadConfig | MixtureHeadConfig | GatedEnergyHeadConfig
