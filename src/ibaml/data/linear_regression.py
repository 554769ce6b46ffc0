"""Bayesian linear regression: tasks whose posterior, and so whose hypergradient, is known in closed form."""

import math
from typing import Literal, get_args

import torch

from ibaml.checks import require_cpu_generator, require_positive_int
from ibaml.types import Batch, Episode, Tensor

Design = Literal["gaussian", "orthogonal"]
"""How the inputs of a task are drawn; see LinearRegressionTasks."""


class LinearRegressionTasks:
    """Regression on ``y = x^T theta + noise``, ``theta ~ N(prior_mean, diag(prior_variance))`` anew for each task.

    The inputs have covariance ``diag(s)`` whose entries are log-spaced from 1 down to ``1 / condition_number``, which
    makes a least-squares problem as hard for gradient descent as one likes. With ``design="gaussian"`` the rows are
    independent draws from ``N(0, diag(s))``, so the covariance of the rows at hand only scatters around it; with
    ``design="orthogonal"`` the support rows satisfy ``X^T X / num_shots = diag(s)`` exactly (query rows stay Gaussian).

    Args:
        prior_mean: Mean of the weights, shape ``[num_features]``.
        prior_variance: Variances of the weights, shape ``[num_features]``, positive.
        noise_variance: Variance of the noise on ``y``, positive.
        num_shots: Support rows of a task.
        num_queries: Query rows of a task.
        design: ``"gaussian"`` or ``"orthogonal"``.
        condition_number: Ratio of the largest to the smallest input variance, at least 1.
        dtype: Floating-point type of the tasks.

    Raises:
        TypeError: If a count is not an int or ``dtype`` not a floating-point type.
        ValueError: If a shape, sign or range is wrong, or ``design="orthogonal"`` has fewer shots than features.

    Examples:
        >>> tasks = LinearRegressionTasks(
        ...     prior_mean=torch.zeros(4), prior_variance=torch.ones(4), noise_variance=0.1, num_shots=8, num_queries=2
        ... )
        >>> episode = tasks.sample(3, generator=torch.Generator().manual_seed(0))
        >>> episode.support.x.shape, episode.support.y.shape
        (torch.Size([3, 8, 4]), torch.Size([3, 8, 1]))
    """

    def __init__(
        self,
        *,
        prior_mean: Tensor,
        prior_variance: Tensor,
        noise_variance: float,
        num_shots: int,
        num_queries: int,
        design: Design = "gaussian",
        condition_number: float = 1.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Checks and keeps the settings; see the class for the arguments."""
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}; use torch.float32 or torch.float64.")
        if prior_mean.ndim != 1 or prior_mean.numel() == 0:
            raise ValueError(f"prior_mean must have shape [num_features], got {tuple(prior_mean.shape)}.")
        if prior_variance.shape != prior_mean.shape:
            raise ValueError(
                f"prior_variance must have the shape of prior_mean, {tuple(prior_mean.shape)}, "
                f"got {tuple(prior_variance.shape)}."
            )
        if not bool((prior_variance > 0).all()):
            raise ValueError(f"prior_variance must be positive, got a smallest entry of {float(prior_variance.min())}.")
        if not (math.isfinite(noise_variance) and noise_variance > 0):
            raise ValueError(f"noise_variance must be a finite positive number, got {noise_variance!r}.")
        if not (math.isfinite(condition_number) and condition_number >= 1):
            raise ValueError(f"condition_number must be a finite number of at least 1, got {condition_number!r}.")
        if design not in get_args(Design):
            raise ValueError(f"design must be one of {get_args(Design)}, got {design!r}.")
        self.num_shots = require_positive_int("num_shots", num_shots)
        self.num_queries = require_positive_int("num_queries", num_queries)
        num_features = prior_mean.numel()
        if design == "orthogonal" and num_shots < num_features:
            raise ValueError(
                f'design="orthogonal" needs num_shots >= num_features, got {num_shots} < {num_features}; '
                'raise num_shots or use design="gaussian".'
            )
        self.prior_mean = prior_mean.detach().to(dtype)
        self.prior_variance = prior_variance.detach().to(dtype)
        self.noise_variance = float(noise_variance)
        self.design: Design = design
        self.condition_number = float(condition_number)
        self.dtype = dtype
        exponents = torch.linspace(0.0, -math.log10(self.condition_number), num_features, dtype=torch.float64)
        self.input_variance = (10.0**exponents).to(dtype)

    @property
    def has_equal_sizes(self) -> bool:
        """True: every draw has the same sizes."""
        return True

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: ``(num_features,)``."""
        return (self.prior_mean.numel(),)

    @property
    def num_outputs(self) -> int:
        """Number of target dimensions: 1."""
        return 1

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        """Draws tasks.

        Args:
            num_tasks: Number of tasks, at least one.
            generator: CPU generator; its state alone decides the result.

        Returns:
            An Episode of ``dtype`` tensors on the CPU: ``x`` of shape ``[num_tasks, num_examples, num_features]`` and
            ``y`` of shape ``[num_tasks, num_examples, 1]``.

        Raises:
            TypeError: If ``num_tasks`` is not an int or ``generator`` not a generator.
            ValueError: If ``num_tasks`` is below one or the generator is not on the CPU.
        """
        require_positive_int("num_tasks", num_tasks)
        require_cpu_generator(generator)
        num_features = self.prior_mean.numel()

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=self.dtype)

        weights = self.prior_mean + self.prior_variance.sqrt() * normal(num_tasks, num_features)
        support_x = normal(num_tasks, self.num_shots, num_features)
        query_x = normal(num_tasks, self.num_queries, num_features)
        if self.design == "orthogonal":
            support_x = torch.linalg.qr(support_x).Q * math.sqrt(self.num_shots)
        scale = self.input_variance.sqrt()
        support_x, query_x = support_x * scale, query_x * scale

        def targets(x: Tensor) -> Tensor:
            noise = math.sqrt(self.noise_variance) * normal(*x.shape[:-1], 1)
            return x @ weights.unsqueeze(-1) + noise

        return Episode(support=Batch(x=support_x, y=targets(support_x)), query=Batch(x=query_x, y=targets(query_x)))


def closed_form_posterior(
    x: Tensor,
    y: Tensor,
    prior_mean: Tensor,
    prior_variance: Tensor,
    noise_variance: Tensor | float,
    *,
    kl_weight: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Returns the best diagonal Gaussian posterior of Bayesian linear regression.

    It minimises ``F(m_t, d) = E_q[mean nll] + kl_weight * KL(N(m_t, diag(d)) || N(m, diag(D)))``. With rows ``x``,
    noise variance ``s2`` and ``A = X^T X / (N s2)``, the terms that depend on ``q`` are

        F = (m_t^T A m_t - 2 m_t^T X^T y / (N s2) + sum_j A_jj d_j) / 2
            + kl_weight / 2 * sum_j (d_j / D_j - log d_j + (m_t - m)_j^2 / D_j)

    and setting both gradients to zero gives

        mean     = (A + kl_weight D^-1)^-1 (kl_weight D^-1 m + X^T y / (N s2))
        variance = kl_weight / (diag(A) + kl_weight / D)

    ``kl_weight = 1/N`` is exact Bayes; its mean is that of the full posterior. (Zhang et al. 2023 print ``1/(2 s2)`` in
    eq. (20b), which is not stationary.) Every step is a torch operation, so differentiating an outer loss through this
    function gives the exact hypergradient that other estimators are judged by.

    Args:
        x: Inputs, shape ``[..., N, num_features]``; leading axes are tasks.
        y: Targets, shape ``[..., N]`` or ``[..., N, 1]``.
        prior_mean: ``m``, shape ``[num_features]``, or with leading axes that broadcast.
        prior_variance: ``D``, the same shape, positive.
        noise_variance: ``s2``, positive, in units of ``y`` squared.
        kl_weight: Weight of the KL against the mean nll, positive; ``None`` means ``1/N``.

    Returns:
        ``(mean, variance)``, each of shape ``[..., num_features]``.

    Raises:
        ValueError: If the shapes of ``x``, ``y`` and the prior disagree.

    Cost: One dense solve of size ``num_features`` per task.

    Examples:
        >>> x, y = torch.ones(1, 1), torch.tensor([2.0])
        >>> closed_form_posterior(x, y, torch.zeros(1), torch.ones(1), 1.0)
        (tensor([1.]), tensor([0.5000]))
    """
    if x.ndim < 2:
        raise ValueError(f"x must have shape [..., num_examples, num_features], got {tuple(x.shape)}.")
    if y.shape == (*x.shape[:-1], 1):
        y = y.squeeze(-1)
    elif y.shape != x.shape[:-1]:
        raise ValueError(
            f"y must have shape {tuple(x.shape[:-1])} or {(*x.shape[:-1], 1)} to match x, got {tuple(y.shape)}."
        )
    for name, value in (("prior_mean", prior_mean), ("prior_variance", prior_variance)):
        if value.ndim == 0 or value.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"{name} must have {x.shape[-1]} entries in its last axis, one per feature of x, "
                f"got shape {tuple(value.shape)}."
            )
    num_examples = x.shape[-2]
    weight = 1.0 / num_examples if kl_weight is None else kl_weight
    gram = x.mT @ x / (num_examples * noise_variance)
    moment = (x * y.unsqueeze(-1)).sum(-2) / (num_examples * noise_variance)
    prior_precision = weight / prior_variance
    mean = torch.linalg.solve(gram + torch.diag_embed(prior_precision), prior_precision * prior_mean + moment)
    variance = weight / (gram.diagonal(dim1=-2, dim2=-1) + prior_precision)
    return mean, variance
