"""Latent test-time training: prompt-specific weights, found by gradient steps on a critic of possible continuations."""
