"""Regression on few inputs: hierarchical models of the whole table, among which left-out groups choose.

Lines and curves have few hyper-parameters, which are estimated from all groups; then each group is predicted from the
others and a few rows of its own, in closed form. A group's part in the hyper-parameters is what this leaves in:
Akaike's correction, the number of hyper-parameters over that of rows, is added to each score. A covariance of all
weights has too many for that: it is estimated from three quarters of the groups and judged on the rest.

The line with the lowest score is kept unless curves are better by one standard error, paired over groups.
"""

import functools
import logging
import math
import time
from typing import NamedTuple

import torch

from ibaml import tree
from ibaml.algorithms import MetaParameters, make_algorithm
from ibaml.data.ragged import TaskSplits
from ibaml.learner.choice import Choice, simplest_good
from ibaml.learner.defaults import CORRELATED, CURVES, LEARNED_CURVES, LINE, SHORT_TRAINER, Suited
from ibaml.learner.hierarchies import Curves, Estimate, LearnedCurves, Lines, estimate, features_of
from ibaml.likelihoods import Gaussian
from ibaml.networks import MLP, RadialBasis
from ibaml.networks.radial_basis import spread_out
from ibaml.priors import FullColumnPrior
from ibaml.priors.columns import FullColumns
from ibaml.seeds import task_generator
from ibaml.train.hierarchical import Groups, in_one, query_nll
from ibaml.train.progress import ProgressBar
from ibaml.types import Episode, Tensor

_logger = logging.getLogger(__name__)

_NUM_CENTRES = 16
_FEWER_CENTRES = 12  # Of one input.
_MOST_ROWS = 1_500
"""Rows that hyper-parameters of curves are estimated from: they are few, and their errors are then a few hundredths."""
_MOST_ENTRIES = 2**20
"""Rows of all groups, filled up to those of the largest one."""
_GROUPS_A_WEIGHT = 3
"""With so many groups for each weight a line of independent ones is not tried: correlations are well estimated."""
_LEAST_GROUPS = 5
"""With fewer groups the simplest model is taken."""
_LEAST_GROUPS_A_WEIGHT, _LEAST_GROUPS_OF_COVARIANCE = 1.5, 30
"""With fewer groups a covariance of all weights is not tried: a quarter of them is to judge it."""
_MOST_SCORED, _NUM_DRAWS = 60, 2
_SHARE_HELD_OUT = 4
_NUM_STAGES = 5
"""Of the whole, for the bar: three or four estimations, and left-out groups."""
_TRIAL_STEPS, _FEW_STEPS = 12, 30
"""Of the estimation of a covariance of all weights: to stop early leaves it near that of the curves."""


class Solved(NamedTuple):
    """A hierarchical model as a head.

    Attributes:
        suited: Network and head.
        meta: What was learned of them.
        choice: Which of the models it is, and why; None where there were too few groups to choose.
        num_steps: Steps that its estimation took.
        is_late: Whether the time limit ended an estimation.
    """

    suited: Suited
    meta: MetaParameters
    choice: Choice | None
    num_steps: int
    is_late: bool = False


def fit_hierarchical(
    tasks: TaskSplits,
    both: Suited,
    *,
    scale: Tensor,
    most_steps: int,
    seed: int,
    deadline: float | None = None,
    bar: ProgressBar | None = None,
) -> Solved:
    """Estimates the models and chooses one.

    Args:
        tasks: The training groups, with real targets.
        both: What else suits them: its likelihood, and which parameters a task adapts.
        scale: Standard deviation of each target, for scores in the unit of the data.
        most_steps: Steps of each estimation at the most.
        seed: Seed of the rows that are drawn.
        deadline: When estimations stop, by ``time.monotonic``. None: no limit.
        bar: Where progress is shown and what was chosen is said.
    """
    bar = bar or ProgressBar(None, "estimate")
    generator = torch.Generator().manual_seed(seed)
    within = functools.partial(estimate, most_steps=most_steps, deadline=deadline)
    groups = _thinned(in_one(list(tasks.tasks)), max(_MOST_ENTRIES, 64 * len(tasks)), generator)
    num_inputs, num_targets = groups.x.shape[-1], groups.y.shape[-1]
    found: dict[str, Estimate] = {}
    if len(tasks) <= _GROUPS_A_WEIGHT * (num_inputs + 1):
        line = Lines(num_inputs=num_inputs, num_targets=num_targets, correlated=False)
        found[LINE] = within(line, groups)
    if len(tasks) < _LEAST_GROUPS:
        return _as_head(found[LINE], tasks.input_shape, both, None)._replace(is_late=_has_passed(deadline))
    bar.update(1, _NUM_STAGES, status=CORRELATED)
    correlated = Lines(num_inputs=num_inputs, num_targets=num_targets, correlated=True)
    start = {**correlated.start(), **(found[LINE].parameters if LINE in found else {})}
    found[CORRELATED] = within(correlated, groups, start=start)
    bar.update(2, status=CURVES)
    some = _thinned(groups, _MOST_ROWS, generator)
    curves = _curves(correlated, some)
    start = {**curves.start(), **found[CORRELATED].parameters}
    found[CURVES] = within(curves, groups, some=some, start=start)
    bar.update(3, status="left-out groups")
    scored = torch.randperm(len(tasks), generator=generator)[:_MOST_SCORED]
    episodes = [_episodes(tasks, scored, seed=seed + draw) for draw in range(_NUM_DRAWS)]
    num_rows = float(groups.present.sum())
    losses = {
        name: torch.stack([_left_out(one, scored, of_draw) for of_draw in episodes]).mean(0)
        + one.num_parameters / num_rows
        for name, one in found.items()
    }
    lines = min((name for name in found if name != CURVES), key=lambda name: float(losses[name].mean()))
    name = simplest_good({lines: losses[lines], CURVES: losses[CURVES]})
    num_weights = len(curves.centres) + num_inputs + 1
    least = max(_LEAST_GROUPS_OF_COVARIANCE, _LEAST_GROUPS_A_WEIGHT * num_weights)
    if name == CURVES and len(tasks) >= least:
        bar.update(4, status=LEARNED_CURVES)
        learned = _learned(found[CURVES], groups, episodes, scored, most_steps=most_steps, deadline=deadline)
        found[LEARNED_CURVES], losses[LEARNED_CURVES] = learned.estimate, losses[CURVES] + learned.gain
        if learned.is_better:
            name = LEARNED_CURVES
            few = min(most_steps, _FEW_STEPS)
            found[name] = within(found[name].hierarchy, groups, start=found[name].parameters, most_steps=few)
    unit = float(torch.log(scale).sum())
    choice = Choice(name, {key: float(value.mean()) + unit for key, value in losses.items()}, len(scored))
    _logger.info("%s", choice)
    bar.update(_NUM_STAGES)
    bar.say(f"Chosen: {choice}.")
    return _as_head(found[name], tasks.input_shape, both, choice)._replace(is_late=_has_passed(deadline))


def _has_passed(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


class _Learned(NamedTuple):
    estimate: Estimate
    gain: float
    is_better: bool


def _curves(lines: Lines, groups: Groups) -> Curves:
    rows = groups.x[groups.present > 0]
    # Distances grow like the root of the number of inputs.
    length_scale = math.sqrt(lines.num_inputs)
    log_length_scale = torch.full((lines.num_inputs,), math.log(length_scale), dtype=rows.dtype)
    most = _FEWER_CENTRES if lines.num_inputs == 1 else _NUM_CENTRES
    return Curves(lines=lines, centres=spread_out(rows, most, log_length_scale), length_scale=length_scale)


def _learned(
    curves: Estimate,
    groups: Groups,
    episodes: list[tuple[Groups, Groups]],
    scored: Tensor,
    *,
    most_steps: int,
    deadline: float | None,
) -> _Learned:
    """Estimates a covariance of all weights from three quarters of the groups and judges it on the rest."""
    assert isinstance(curves.hierarchy, Curves)
    held_out = scored[: max(1, min(len(scored), len(groups.present) // _SHARE_HELD_OUT))]
    inside = torch.ones(len(groups.present), dtype=torch.bool)
    inside[held_out] = False
    rest = groups.of(inside)
    family = LearnedCurves(curves=curves.hierarchy, hyper_parameters=curves.parameters)
    # Length-scales and variances of the simpler one are those of all groups, which speaks for it if anything.
    found = [
        estimate(curves.hierarchy, rest, start=curves.parameters, most_steps=0),
        estimate(family, rest, most_steps=min(most_steps, _TRIAL_STEPS), deadline=deadline),
    ]
    place = torch.arange(len(held_out))
    losses = [
        torch.stack([_nll(one, *one.new_group(), support.of(place), query.of(place)) for support, query in episodes])
        for one in found
    ]
    simple, full = (one.mean(0) for one in losses)
    is_better = float(full.mean()) < float(simple.mean())
    return _Learned(found[1], float((full - simple).mean()), is_better)


def _left_out(found: Estimate, scored: Tensor, episodes: tuple[Groups, Groups]) -> Tensor:
    """Returns the nll of some groups' queries, each predicted from the other groups and its support."""
    mean, covariance = found.new_group_without_each()
    return _nll(found, mean[:, scored], covariance[:, scored], *episodes)


def _nll(found: Estimate, mean: Tensor, covariance: Tensor, support: Groups, query: Groups) -> Tensor:
    if mean.ndim == 2:
        mean, covariance = mean.unsqueeze(1), covariance.unsqueeze(1)
    p = found.parameters
    parts = [(features_of(found.hierarchy, p, part), part) for part in (support, query)]
    return query_nll(mean, covariance, p["log_noise"], parts[0], parts[1])


def _episodes(tasks: TaskSplits, indices: Tensor, *, seed: int) -> tuple[Groups, Groups]:
    drawn: list[Episode] = [tasks.split(index, generator=task_generator(seed, index)) for index in indices.tolist()]
    return in_one([episode.support for episode in drawn]), in_one([episode.query for episode in drawn])


def _thinned(groups: Groups, most_rows: int, generator: torch.Generator) -> Groups:
    """Returns some of the rows of each group at random, and if there are very many of the groups."""
    num_groups, num_rows = groups.present.shape
    if groups.present.numel() <= most_rows:
        return groups
    each = min(num_rows, max(8, most_rows // num_groups))
    # Rows that do not count come last.
    order = (torch.rand(num_groups, num_rows, generator=generator) - groups.present).argsort(1)[:, :each]
    x, y = (torch.take_along_dim(part, order.unsqueeze(-1), 1) for part in (groups.x, groups.y))
    thinned = Groups(x, y, torch.take_along_dim(groups.measured, order.unsqueeze(0), 2))
    if num_groups * each <= most_rows:
        return thinned
    return thinned.of(torch.randperm(num_groups, generator=generator)[: most_rows // each])


def _as_head(found: Estimate, input_shape: tuple[int, ...], both: Suited, choice: Choice | None) -> Solved:
    """Writes the model as a linear-Gaussian head with a full prior covariance, in the dtype of the network."""
    hierarchy, p = found.hierarchy, found.parameters
    mean, covariance = found.new_group()
    num_targets, num_weights = mean.shape
    shared: dict[str, Tensor] = {}
    if isinstance(hierarchy, Lines):
        network = MLP(num_targets, input_shape=input_shape, hidden_sizes=(), zero_head=True)
    else:
        curves, of_curves = (
            (hierarchy.curves, hierarchy.hyper_parameters) if isinstance(hierarchy, LearnedCurves) else (hierarchy, p)
        )
        assert isinstance(curves, Curves)
        network = RadialBasis(num_targets, input_shape=input_shape, num_centres=len(curves.centres))
        shared = {"centres": curves.centres, "log_length_scale": of_curves["log_length_scale"]}
    with torch.no_grad():
        for name, value in shared.items():
            network.get_parameter(name).copy_(value)
    shared[Gaussian.parameter_name] = p["log_noise"]
    factor = torch.linalg.cholesky(covariance)
    diagonal = torch.diagonal(factor, dim1=-2, dim2=-1)
    rows, columns = torch.tril_indices(num_weights, num_weights, -1)
    prior = FullColumns(mean, torch.log(diagonal), (factor / diagonal.unsqueeze(-1))[:, rows, columns])
    algorithm = make_algorithm("linear_gaussian", prior=FullColumnPrior(), outer="marginal")
    suited = both._replace(network=network, algorithm=algorithm, trainer=SHORT_TRAINER)
    meta = tree.map(lambda leaf: leaf.detach(), MetaParameters(prior, shared))
    return Solved(suited, meta, choice, found.num_steps)
