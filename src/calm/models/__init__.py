"""Stem, backbone and head, and nothing else."""

from calm.models.latent_lm import LatentLM as LatentLM
from calm.models.latent_lm import LatentLMConfig as LatentLMConfig
from calm.models.predictor import Decoding as Decoding
from calm.models.predictor import NextVector as NextVector
from calm.models.predictor import Noise as Noise
from calm.models.predictor import Predictor as Predictor
from calm.models.predictor import sample_chunks as sample_chunks
from calm.models.token_lm import TokenLM as TokenLM
from calm.models.token_lm import TokenLMConfig as TokenLMConfig
