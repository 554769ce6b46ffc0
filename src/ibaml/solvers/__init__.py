"""Solvers of inner problems and linear systems. They know functions and pytrees, and no probability."""
