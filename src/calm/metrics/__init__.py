"""Scores as sums: arrays in, mergeable sums out, divided once at the end. Nothing here imports a model."""
