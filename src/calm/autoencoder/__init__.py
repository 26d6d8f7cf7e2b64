"""Stage 1: a chunk of K tokens becomes one latent vector, and comes back."""

from calm.autoencoder.autoencoder import Autoencoder as Autoencoder
from calm.autoencoder.autoencoder import AutoencoderConfig as AutoencoderConfig
from calm.autoencoder.autoencoder import HierarchicalAutoencoder as HierarchicalAutoencoder
