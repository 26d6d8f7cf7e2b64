"""Published CALM checkpoints, in and out."""
