"""Gaussian classes in feature space: a Bayesian posterior over class means in closed form, and Bayes' rule.

With features ``z``, independent of each other given the class: ``mu_c ~ N(m, diag(tau2))`` and ``z | c ~ N(mu_c,
diag(sigma2))``. From ``n_c`` examples of the mean ``zbar_c`` follows for each feature

    mu_c | support ~ N(mu_c', v_c')   v_c' = 1 / (1 / tau2 + n_c / sigma2)   mu_c' = m + n_c v_c' / sigma2 (zbar_c - m)

The posterior is Gaussian with a diagonal covariance exactly: the family of Zhang et al. 2023 in closed form. A query
belongs to class ``c`` with a probability in proportion to ``pi_c N(z; mu_c', sigma2 + v_c')``, by Bayes' rule, at no
temperature. Relatives: MetaQDA, Bayesian prototypes, linear discriminant analysis (many examples).
"""

import dataclasses
import math
from typing import ClassVar, NamedTuple

import torch

from ibaml.algorithms.base import MetaParameters
from ibaml.algorithms.heads.base import Head
from ibaml.algorithms.heads.targets import indicators, require_classes, require_likelihood_of_classes
from ibaml.algorithms.nll import Nll
from ibaml.likelihoods import Categorical
from ibaml.likelihoods.base import wide
from ibaml.types import Batch, Episode, Params, Tensor

_NUM_PAIRS = 32
"""Pairs of draws of the class means, for what a label would tell."""


class GaussianClassesPrior(NamedTuple):
    """What is learned over tasks.

    Attributes:
        mean: Mean ``m`` of the class means, ``[num_priors, num_features]``.
        log_tau2: Logarithm of their variance, ``[num_priors, num_features]``.
        log_sigma2: Logarithm of the variance within a class, ``[num_features]``.
        log_frequency: Logarithm of the frequency of each class up to a constant, ``[num_classes]``; no classes if
            classes are exchangeable, and so as frequent as each other.
    """

    mean: Tensor
    log_tau2: Tensor
    log_sigma2: Tensor
    log_frequency: Tensor


class GaussianClassesPosterior(NamedTuple):
    """What is known of a task.

    Attributes:
        mean: Mean ``mu_c'`` of each class mean, ``[num_classes, num_features]``.
        log_var: Logarithm of its variance ``v_c'``, ``[num_classes, num_features]``.
        log_sigma2: Logarithm of the variance within a class, ``[num_features]``.
        log_frequency: Logarithm of the frequency of each class, ``[num_classes]``.
        prior: What was known before.
    """

    mean: Tensor
    log_var: Tensor
    log_sigma2: Tensor
    log_frequency: Tensor
    prior: GaussianClassesPrior


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianClasses(Head):
    """Gaussian classes: a generative head, whose outputs are the log densities of features and class together.

    Their softmax are the probabilities, and their logsumexp is the log density of the features in the task. A class
    without examples keeps the prior. So does one that is not in the task: whether an input belongs to such a class is a
    question of Bayes' rule as well (``log_bayes_factor``).

    Attributes:
        tied: Whether all classes have one prior, as exchangeable classes do; then a task may have any number of them.
            Else each has its own mean and variance, and its frequency.
        initial_class_variance: Variance ``tau2`` of class means where training starts, for features of unit variance.
        initial_within_variance: Variance ``sigma2`` within a class there, as a multiple of the square root of the
            number of features: those of a network depend on each other, and at their own variance probabilities would
            start at 0 and 1.

    Raises:
        ValueError: If a variance is not positive.
    """

    tied: bool = True
    initial_class_variance: float = 1.0
    initial_within_variance: float = 1.0

    name: ClassVar[str] = "gaussian_classes"

    def __post_init__(self) -> None:
        """Refuses settings out of range."""
        for name in ("initial_class_variance", "initial_within_variance"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, but is {value}.")

    @property
    def serves_any_number_of_outputs(self) -> bool:
        """Whether all classes have one prior."""
        return self.tied

    def check_task(self, nll: Nll, meta: MetaParameters, episode: Episode) -> None:
        """Refuses targets that are numbers; see ``Algorithm``."""
        require_likelihood_of_classes(nll, self.name)
        super().check_task(nll, meta, episode)

    def describe(self) -> str:
        """Returns how a task is solved."""
        return "exact posterior of class means, Bayes' rule"

    def init_prior(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> GaussianClassesPrior:
        """Returns the prior that training starts from; see ``Head``. The constant input has no part in it."""
        shape = (1 if self.tied else num_outputs, num_inputs - 1)
        within = self.initial_within_variance * math.sqrt(max(num_inputs - 1, 1))
        return GaussianClassesPrior(
            like.new_zeros(shape),
            like.new_full(shape, math.log(self.initial_class_variance)),
            like.new_full(shape[1:], math.log(within)),
            like.new_zeros(0 if self.tied else num_outputs),
        )

    def parameter_groups(self, prior: GaussianClassesPrior) -> tuple[list[Tensor], list[Tensor]]:
        """Returns means and frequencies, and the log-variances."""
        return [prior.mean, prior.log_frequency], [prior.log_tau2, prior.log_sigma2]

    def solve(
        self, prior: GaussianClassesPrior, shared: Params, support: Batch, num_outputs: int
    ) -> tuple[GaussianClassesPosterior, Tensor]:
        """Returns the posterior, exact; see ``Head``.

        Raises:
            ValueError: If there is a prior for each of another number of classes.

        Cost:
            ``K N F`` operations.
        """
        del shared
        require_classes(num_outputs, len(prior.mean), tied=self.tied)
        features = wide(support.x)[0][:, :-1]
        return self._condition(prior, prior.mean, prior.log_tau2, Batch(features, support.y), num_outputs)

    @property
    def is_sequential(self) -> bool:
        """Whether features are not centred at examples."""
        return not self.centre

    def extend(
        self, solution: GaussianClassesPosterior, shared: Params, more: Batch, num_outputs: int
    ) -> tuple[GaussianClassesPosterior, Tensor]:
        """Returns the posterior after further examples, some of which may be of further classes; see ``Head``.

        Cost:
            ``K N F`` operations for ``N`` further examples.
        """
        del shared
        features, prior = wide(more.x)[0][:, :-1], solution.prior
        num_new = max(num_outputs - len(solution.mean), 0)
        mean = torch.cat([solution.mean, prior.mean[:1].expand(num_new, -1)])
        log_var = torch.cat([solution.log_var, prior.log_tau2[:1].expand(num_new, -1)])
        return self._condition(prior, mean, log_var, Batch(features, more.y), len(mean))

    def _condition(
        self, prior: GaussianClassesPrior, mean: Tensor, log_var: Tensor, support: Batch, num_outputs: int
    ) -> tuple[GaussianClassesPosterior, Tensor]:
        """Returns the posterior of class means ``N(mean, exp(log_var))``, one for each class or one for all."""
        features = support.x
        members = indicators(support.y, num_outputs, like=features)
        counts = members.sum(-1, keepdim=True)
        # Sums of differences from the mean of the classes: nothing cancels for a class of few examples.
        centre = mean.mean(0)
        sums = members @ (features - centre) - counts * (mean - centre)
        ratio = torch.exp(log_var - prior.log_sigma2)
        shrunk = 1 + counts * ratio
        frequency = torch.log_softmax(prior.log_frequency, 0) if len(prior.log_frequency) else None
        posterior = GaussianClassesPosterior(
            mean + sums * ratio / shrunk,
            log_var - torch.log(shrunk),
            prior.log_sigma2,
            features.new_full((num_outputs,), -math.log(num_outputs)) if frequency is None else frequency,
            prior,
        )
        return posterior, features.new_zeros(())

    def predict(
        self, solution: GaussianClassesPosterior, shared: Params, inputs: Tensor, noise: Params
    ) -> dict[str, Tensor]:
        """Returns the log densities, ``[1, num_examples, num_classes]``: class means are integrated out.

        ``"out_of_task"`` is the log Bayes factor of a class that is not in the task.
        """
        del shared, noise
        outputs = self.mean(solution, inputs)
        return {"outputs": outputs.unsqueeze(0), "out_of_task": self.log_bayes_factor(solution, inputs, outputs)}

    def log_bayes_factor(self, solution: GaussianClassesPosterior, inputs: Tensor, outputs: Tensor) -> Tensor:
        """Returns ``log N(z; m, tau2 + sigma2) - log sum_c pi_c N(z; mu_c', v_c' + sigma2)``, ``[num_examples]``.

        It is the evidence for a class that the support set has no example of, against that for the task's classes. The
        log density in the task alone, without the first term, is low for everything that is far from the middle, in
        dimensions that tell no classes apart too. (Validation tasks of glyphs, AUROC: 0.886 against 0.851 for 5 shots,
        0.800 against 0.662 for one.) Where each class has its own prior, a new class has their mixture.

        Args:
            solution: From ``solve``.
            inputs: ``z``, ``[num_examples, num_inputs]``.
            outputs: ``mean(solution, inputs)``.
        """
        prior = solution.prior
        frequency = inputs.new_full((len(prior.mean),), -math.log(len(prior.mean)))
        frequency = torch.log_softmax(prior.log_frequency, 0) if len(prior.log_frequency) else frequency
        new = solution._replace(mean=prior.mean, log_var=prior.log_tau2, log_frequency=wide(frequency)[0])
        return torch.logsumexp(self.mean(new, inputs), -1) - torch.logsumexp(outputs, -1)

    def label_information(
        self, solution: GaussianClassesPosterior, inputs: Tensor, *, generator: torch.Generator
    ) -> Tensor:
        """Returns the mutual information between the label of each input and the class means, ``[num_examples]``.

        In nats, given the features, which tell of the class means by themselves: with ``p_c = p(c | z)``

            I = H[p] - sum_c p_c E[H[p(. | z, mu)]]     mu ~ p(mu | z, c, support)

        where ``mu_c`` has taken in ``z`` and the other means have not. The expectations are means over draws in pairs
        of opposite sign, the same for all inputs.

        Args:
            solution: From ``solve``.
            inputs: ``z``, ``[num_examples, num_inputs]``.
            generator: Source of randomness.

        Cost:
            ``M K (F + K)`` operations for ``M`` inputs and each of the draws.
        """
        middle, scale = solution.mean.mean(0), torch.exp(-0.5 * solution.log_sigma2)
        # In units of the deviation within a class, about the middle of the class means; see ``mean``.
        features, means = (wide(inputs)[0][:, :-1] - middle) * scale, (solution.mean - middle) * scale
        variance = torch.exp(solution.log_var - solution.log_sigma2)
        # What ``z`` leaves of its distance to the mean of its class: 1 / (1 + v / sigma2).
        kept = 1 / (1 + variance)
        noise = torch.randn(_NUM_PAIRS, *means.shape, generator=generator, dtype=means.dtype).to(means.device)
        conditional = features.new_zeros(len(features), len(means))
        for draw in torch.cat([noise, -noise]):
            others = _squares(features, means + variance.sqrt() * draw, torch.ones_like(kept))
            own = _squares(features, means + (variance / kept).sqrt() * draw, kept**2)
            logits = solution.log_frequency - 0.5 * others
            # One row of logits for each class that the label may be: in it, that class has taken in ``z``.
            of_label = logits.unsqueeze(-2) + torch.diag_embed(0.5 * (others - own))
            conditional += _entropy(torch.log_softmax(of_label, -1)) / (2 * _NUM_PAIRS)
        log_probs = torch.log_softmax(self.mean(solution, inputs), -1)
        return (_entropy(log_probs) - (log_probs.exp() * conditional).sum(-1)).clamp_min(0)

    def outer_loss(self, solution: GaussianClassesPosterior, shared: Params, query: Batch) -> Tensor:
        """Returns the cross entropy of the query set; see ``Head``."""
        return Categorical().nll(self.mean(solution, query.x), query.y, shared).mean()

    def mean(self, solution: GaussianClassesPosterior, inputs: Tensor) -> Tensor:
        """Returns ``log pi_c + log N(z; mu_c', sigma2 + v_c')``, ``[num_examples, num_classes]``.

        Args:
            solution: From ``solve``.
            inputs: ``z``, ``[num_examples, num_inputs]``.

        Cost:
            ``M K F`` operations for ``M`` inputs.
        """
        # About the middle of the class means, so that what is subtracted is of the size of what is left.
        middle = solution.mean.mean(0)
        features, means = wide(inputs)[0][:, :-1] - middle, solution.mean - middle
        log_variance = torch.logaddexp(solution.log_sigma2, solution.log_var)
        squares = _squares(features, means, torch.exp(-log_variance))
        constants = (log_variance + math.log(2 * math.pi)).sum(-1)
        return solution.log_frequency - 0.5 * (squares + constants)


def _squares(features: Tensor, means: Tensor, weights: Tensor) -> Tensor:
    """Returns ``sum_f weights_cf (z_f - mean_cf)^2``, ``[num_examples, num_classes]``."""
    # Expanded, so that no tensor has examples, classes and features.
    return features**2 @ weights.mT - 2 * features @ (means * weights).mT + (means**2 * weights).sum(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    return torch.special.entr(log_probs.exp()).sum(-1)
