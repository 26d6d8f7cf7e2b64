"""The training engine: loop, steps, optimiser, checkpoints, run folder, trackers, mesh."""
