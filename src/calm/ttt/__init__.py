"""Latent test-time training: a prompt's futures are imagined, judged, and the weights changed for that prompt alone."""
