"""Latent spaces beside the Gaussian one: a sphere, and two levels of latents."""
