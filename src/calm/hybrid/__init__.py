"""Mixers beside attention: state space, convolution, recurrence, Hopfield memory; gates between them; the segment reasoner."""
