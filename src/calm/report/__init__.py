"""Tables and pictures made from scores and run folders."""
