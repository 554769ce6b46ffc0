"""Hypergradients: the derivative of an outer loss through the solution of an inner problem.

For ``O(v(theta), theta)`` with ``v(theta)`` from an inner problem ``min_v F(v, theta)`` there are four estimators. All
return ``(gradient, HypergradientInfo)`` with the gradient in the structure of ``theta``; all are pure functions of
pytrees and run under ``torch.func.vmap`` over tasks.

An implicit gradient describes the *solution* of the inner problem: it cannot learn anything that only the solver sees,
such as its learning rate or its starting point. And it is as wrong as ``v`` is far from the solution, which is why the
inner gradient norm and the linear residual are part of every result.
"""

from ibaml.hypergradients.base import BilevelLoss, InnerRun
from ibaml.hypergradients.gaussian import gaussian_implicit_hypergradient, regularised_implicit_hypergradient
from ibaml.hypergradients.implicit import implicit_hypergradient
from ibaml.hypergradients.unrolled import first_order_hypergradient, unrolled_hypergradient

__all__ = [
    "BilevelLoss",
    "InnerRun",
    "first_order_hypergradient",
    "gaussian_implicit_hypergradient",
    "implicit_hypergradient",
    "regularised_implicit_hypergradient",
    "unrolled_hypergradient",
]
