"""Stem, backbone and head, and nothing else."""

from calm.models.latent_lm import LatentLM as LatentLM
from calm.models.latent_lm import LatentLMConfig as LatentLMConfig
