"""Evaluations of trained models on held-out text: one file a question, with its measure, its result and its table."""
