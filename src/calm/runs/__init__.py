"""From a configuration to a finished run folder, and from a run folder to a loaded model."""
