"""Baselines beside any learner, on the same test tasks, each tuned on the validation tasks.

A baseline of one's own is an object that satisfies ``Baseline`` and one line in ``registry.py``. One that trains by
``ibaml.baselines.training`` says with ``settings(problem)`` what it tries, and so how long it takes. Most are a
``MetaLearner`` with certain settings, or with meta-parameters that are computed rather than trained.

| name | what | trains |
|---|---|---|
| `logistic_regression` | classes: one for each task, on its support set | no |
| `ridge` | numbers: the same with ridge regression | no |
| `neighbours` | nearest support examples by the inputs | no |
| `pooled` | one linear model for all tasks; classes only if they mean the same in all | no |
| `gp` | numbers: a Gaussian process for each task, hyper-parameters shared | yes |
| `prototypes` | classes: prototypical network on the learner's network | yes |
| `maml` | MAML on the learner's network | yes |
"""

from ibaml.baselines.base import Baseline, FittedBaseline, Problem, pose
from ibaml.baselines.compare import BaselineComparison, Method, compare_with_baselines
from ibaml.baselines.registry import BASELINES

__all__ = [
    "BASELINES",
    "Baseline",
    "BaselineComparison",
    "FittedBaseline",
    "Method",
    "Problem",
    "compare_with_baselines",
    "pose",
]
