"""Studies: many short runs under one budget, each a run folder, and the tables that come of them."""
