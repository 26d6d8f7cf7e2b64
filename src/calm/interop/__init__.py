"""Models in and out: the published PyTorch checkpoints, and folders of safetensors that other programs read."""
