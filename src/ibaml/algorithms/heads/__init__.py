"""Algorithms whose inner problem is solved exactly, for parameters that the network's outputs are affine in."""

from ibaml.algorithms.heads.linear_gaussian import LinearGaussian

__all__ = ["LinearGaussian"]
