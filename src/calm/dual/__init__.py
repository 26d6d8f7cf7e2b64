"""A token model and a next-vector model on one text: drafting and routing."""
