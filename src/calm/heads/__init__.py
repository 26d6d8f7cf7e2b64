"""Heads beside the paper's energy head: other models of the distribution of the next latent, and losses on its samples."""
