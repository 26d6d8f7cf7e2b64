"""Decoders that write a chunk in the autoencoder's place."""
