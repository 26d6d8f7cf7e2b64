"""Studies: many short runs at equal compute, and the tables they print."""
