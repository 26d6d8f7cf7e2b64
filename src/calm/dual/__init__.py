"""A token model and a next-vector model at work on one text: drafting and routing."""
