"""The baseline: a token language model on the same backbone."""
