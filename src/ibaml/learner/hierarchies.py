"""Hierarchical models that a table of groups may have: what its features and the prior of their weights are.

All are linear-Gaussian heads, and differ in how a group may differ from the others:

- a line in the inputs, with independent or with correlated weights;
- curves: a smooth curve that all groups share, and of each group a correlated line and a smooth curve of its own.
  Curves are sums of the functions of ``RadialBasis`` with independent weights, those of the common one of variance
  ``exp(2 log_common)``, those of a group of variance ``exp(2 log_own)``;
- curves whose weights have any covariance, learned from the groups: functions of few dimensions, such as sines of
  unknown phase, are found so.

Hyper-parameters have weak normal priors, in units in which inputs and targets have unit variance: where data say
nothing they stay near the middle, instead of far away.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch

from ibaml.networks.radial_basis import radial_features
from ibaml.priors.full import unit_triangular
from ibaml.train.hierarchical import (
    Groups,
    Moments,
    Restricted,
    flat_precision,
    minimise,
    moments,
    restricted,
    restricted_nll,
    wider,
)
from ibaml.types import Params, Tensor

_DEVIATIONS: Mapping[str, float] = {
    "log_noise": 5.0,
    "log_scale": 2.0,
    "lower": 2.0,
    "log_length_scale": 1.0,
    "log_common": 1.5,
    "log_own": 1.5,
}
"""Standard deviations of the priors of hyper-parameters."""

_NUM_EARLIER_GROUPS = 1.0
"""How much the covariance of curves counts beside that of their weights among groups, in groups."""


class Hierarchy(Protocol):
    """A family of hierarchical models; ``p`` are its hyper-parameters."""

    @property
    def has_fixed_features(self) -> bool:
        """Whether features do not depend on hyper-parameters."""
        ...

    def start(self) -> Params:
        """Returns the hyper-parameters that estimation starts from; ``log_noise`` is among them."""
        ...

    def features(self, p: Params, x: Tensor) -> Tensor:
        """Returns ``Z``, ``[num_rows, num_features]``, the constant last, of inputs ``[num_rows, num_inputs]``."""
        ...

    def factor(self, p: Params) -> Tensor:
        """Returns ``C``: weights of a group have the covariance ``C C^T``; ``[num_targets, num_features, ...]``."""
        ...

    def precision(self, p: Params) -> Tensor:
        """Returns the precision of each common weight, ``[num_targets, num_features]``."""
        ...

    def penalty(self, p: Params) -> Tensor:
        """Returns minus the log density of the hyper-parameters' prior, up to a constant."""
        ...


def _penalty(p: Params, start: Params) -> Tensor:
    terms = [(((p[name] - start[name]) / _DEVIATIONS[name]) ** 2).sum() for name in p]
    return 0.5 * torch.stack(terms).sum()


def _triangular(log_scale: Tensor, lower: Tensor) -> Tensor:
    return torch.exp(log_scale).unsqueeze(-1) * unit_triangular(lower, log_scale.shape[-1])


def _with_constant(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """Each group has a line in the inputs.

    Attributes:
        num_inputs: Number of inputs.
        num_targets: Number of targets.
        correlated: Whether intercept and slopes correlate.
    """

    num_inputs: int
    num_targets: int
    correlated: bool

    @property
    def has_fixed_features(self) -> bool:
        """True."""
        return True

    def start(self) -> Params:
        """Returns half of the targets' variance for the lines, and a tenth for the noise; see ``Hierarchy``."""
        log_scale = torch.full((self.num_targets, self.num_inputs + 1), 0.5 * math.log(0.5 / self.num_inputs)).double()
        log_scale[:, -1] = 0.5 * math.log(0.5)
        found = {"log_noise": torch.full((self.num_targets,), math.log(0.1)).double(), "log_scale": log_scale}
        if self.correlated:
            found["lower"] = self._uncorrelated
        return found

    @property
    def _uncorrelated(self) -> Tensor:
        return torch.zeros(self.num_targets, self.num_inputs * (self.num_inputs + 1) // 2, dtype=torch.float64)

    def features(self, p: Params, x: Tensor) -> Tensor:
        """Returns inputs and constant; see ``Hierarchy``."""
        del p
        return _with_constant(x)

    def factor(self, p: Params) -> Tensor:
        """See ``Hierarchy``."""
        return _triangular(p["log_scale"], p.get("lower", self._uncorrelated))

    def precision(self, p: Params) -> Tensor:
        """Returns next to nothing; see ``Hierarchy``."""
        return flat_precision(*p["log_scale"].shape)

    def penalty(self, p: Params) -> Tensor:
        """See ``Hierarchy``."""
        return _penalty(p, self.start())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """A curve that all groups share, and a correlated line and a curve of each group.

    Attributes:
        lines: The lines.
        centres: Centres of the curves, ``[num_centres, num_inputs]``.
        length_scale: Length-scale of all inputs where estimation starts.
    """

    lines: Lines
    centres: Tensor
    length_scale: float

    @property
    def has_fixed_features(self) -> bool:
        """False: length-scales are learned."""
        return False

    def start(self) -> Params:
        """See ``Hierarchy``."""
        one = torch.ones(self.lines.num_targets, dtype=torch.float64)
        return {
            **self.lines.start(),
            "log_length_scale": torch.full((self.lines.num_inputs,), math.log(self.length_scale)).double(),
            "log_common": 0 * one,
            "log_own": math.log(0.3) * one,
        }

    def features(self, p: Params, x: Tensor) -> Tensor:
        """Returns functions around the centres, inputs and constant; see ``Hierarchy``."""
        return torch.cat([radial_features(x, self.centres, p["log_length_scale"]), _with_constant(x)], -1)

    def factor(self, p: Params) -> Tensor:
        """Returns a diagonal block of curves, and that of the lines; see ``Hierarchy``."""
        own, of_lines = torch.exp(p["log_own"]).unsqueeze(-1).expand(-1, len(self.centres)), self.lines.factor(p)
        right = torch.nn.functional.pad(of_lines, (len(self.centres), 0))
        return torch.cat([torch.nn.functional.pad(torch.diag_embed(own), (0, of_lines.shape[-1])), right], -2)

    def precision(self, p: Params) -> Tensor:
        """Returns that of the common curve, and of lines next to nothing; see ``Hierarchy``."""
        common = torch.exp(-2 * p["log_common"]).unsqueeze(-1).expand(-1, len(self.centres))
        return torch.cat([common, self.lines.precision(p)], -1)

    def penalty(self, p: Params) -> Tensor:
        """See ``Hierarchy``."""
        return _penalty(p, self.start())


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LearnedCurves:
    """Curves whose weights have any covariance ``C0 L L^T C0^T``, where ``C0 C0^T`` is that of ``Curves``.

    The prior of ``L L^T`` is inverse Wishart about the identity, as if some groups had been seen with the covariance of
    ``Curves``: ``nu / 2 (trace (L L^T)^-1 + log |L L^T|)``.

    Attributes:
        curves: The family.
        hyper_parameters: Those of ``curves``, of which length-scales and the common curve's variance are kept.
    """

    curves: Curves
    hyper_parameters: Params

    @property
    def has_fixed_features(self) -> bool:
        """True."""
        return True

    def start(self) -> Params:
        """Returns ``L = I``; see ``Hierarchy``."""
        factor = self.curves.factor(self.hyper_parameters)
        num_targets, size = factor.shape[:2]
        return {
            "log_noise": self.hyper_parameters["log_noise"],
            "log_scale": torch.zeros(num_targets, size, dtype=torch.float64),
            "lower": torch.zeros(num_targets, size * (size - 1) // 2, dtype=torch.float64),
        }

    def features(self, p: Params, x: Tensor) -> Tensor:
        """Returns those of the curves; see ``Hierarchy``."""
        del p
        return self.curves.features(self.hyper_parameters, x)

    def factor(self, p: Params) -> Tensor:
        """Returns ``C0 L``; see ``Hierarchy``."""
        return self.curves.factor(self.hyper_parameters) @ _triangular(p["log_scale"], p["lower"])

    def precision(self, p: Params) -> Tensor:
        """Returns that of the curves; see ``Hierarchy``."""
        del p
        return self.curves.precision(self.hyper_parameters)

    def penalty(self, p: Params) -> Tensor:
        """See ``Hierarchy``."""
        factor = _triangular(p["log_scale"], p["lower"])
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype)
        inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
        return _NUM_EARLIER_GROUPS * (0.5 * (inverse**2).sum() + p["log_scale"].sum())


class Estimate(NamedTuple):
    """A model of a family.

    Attributes:
        hierarchy: The family.
        parameters: Hyper-parameters.
        restricted: Its restricted likelihood of the groups.
        num_steps: Steps of the estimation.
    """

    hierarchy: Hierarchy
    parameters: Params
    restricted: Restricted
    num_steps: int

    @property
    def num_parameters(self) -> int:
        """Number of hyper-parameters."""
        return sum(value.numel() for value in self.parameters.values())

    def new_group(self) -> tuple[Tensor, Tensor]:
        """Returns mean and covariance of a new group's weights, ``[num_targets, num_features(, num_features)]``."""
        return self._new(*self.restricted.common_weights())

    def new_group_without_each(self) -> tuple[Tensor, Tensor]:
        """Returns the same from all groups but one, for each that is left out, ``[num_targets, num_groups, ...]``."""
        return self._new(*self.restricted.common_weights_without_each())

    def _new(self, mean: Tensor, uncertainty: Tensor) -> tuple[Tensor, Tensor]:
        """Adds to the variation among groups how uncertain the common weights are.

        The covariance among ``T`` groups is estimated with ``T - 1`` degrees of freedom, so that a new group's weights
        follow a Student t rather than a Gaussian: this one has the same central 90%.
        """
        factor = self.hierarchy.factor(self.parameters)
        widths = torch.tensor([wider(number - 1) for number in self.restricted.num_groups.tolist()]).to(factor)
        among = widths[:, None, None] * (factor @ factor.mT)
        return mean, among.view(len(factor), *[1] * (mean.ndim - 2), *factor.shape[1:]) + uncertainty


def features_of(hierarchy: Hierarchy, p: Params, groups: Groups) -> Tensor:
    """Returns the features of groups, ``[num_groups, num_rows, num_features]``."""
    return hierarchy.features(p, groups.x.flatten(0, 1)).unflatten(0, groups.x.shape[:2])


def estimate(
    hierarchy: Hierarchy,
    groups: Groups,
    *,
    some: Groups | None = None,
    start: Params | None = None,
    most_steps: int,
    deadline: float | None = None,
) -> Estimate:
    """Estimates the hyper-parameters of a family from groups.

    Args:
        hierarchy: The family.
        groups: All groups; what is known of the common weights is of them.
        some: Rows that hyper-parameters are estimated from. None: all.
        start: Hyper-parameters to start from. None: those of the family.
        most_steps: Number of steps at the most.
        deadline: When to stop, by ``time.monotonic``. None: no limit.
    """
    start = hierarchy.start() if start is None else start
    some = groups if some is None else some
    fixed = moments(features_of(hierarchy, start, some), some) if hierarchy.has_fixed_features else None

    def loss(p: Params) -> Tensor:
        model = (hierarchy.factor(p), p["log_noise"], hierarchy.precision(p))
        if fixed is not None:
            return restricted_nll(*model, fixed) + hierarchy.penalty(p)
        features = features_of(hierarchy, p, some)
        of = moments(features.detach(), some)
        return restricted_nll(*model, of, features, some) + hierarchy.penalty(p)

    found = minimise(loss, start, most_steps=most_steps, deadline=deadline)
    of = moments(features_of(hierarchy, found.parameters, groups), groups)
    return Estimate(hierarchy, found.parameters, _at(hierarchy, found.parameters, of), found.num_steps)


def _at(hierarchy: Hierarchy, p: Params, of: Moments) -> Restricted:
    return restricted(hierarchy.factor(p), p["log_noise"], hierarchy.precision(p), of)
