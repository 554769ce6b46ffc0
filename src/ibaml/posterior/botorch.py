"""A posterior as a model of BoTorch, whose acquisition functions and optimisers then choose what to measure.

The only module that imports BoTorch and GPyTorch, an optional extra; ``TaskPosterior.to_botorch`` imports it.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from botorch.models.model import FantasizeMixin, Model
from botorch.posteriors import GPyTorchPosterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal

from ibaml import tree
from ibaml.types import Batch, Tensor

if TYPE_CHECKING:
    from ibaml.posterior.fitted import FittedModel

_JITTER = 1e-9
"""Relative to the variance: without it the covariance of near rows, or of more rows than weights, has no factor."""


class TaskModel(Model, FantasizeMixin):
    """The functions of one task under a Gaussian posterior, in the units of the data, differentiable in the inputs.

    Inputs are those of the data: ``[..., q, d]`` with the features of training in their order. The parameters are
    fixed: there is nothing to fit.

    Args:
        fitted: The fitted model.
        value: What the algorithm's ``adapt`` returned; with ``batch_shape``, with all its axes together in front.
        batch_shape: Shape of a batch of posteriors, as fantasies make them.

    Raises:
        ValueError: If the algorithm has no Gaussian posterior over functions, or features are made of other columns
            than numbers.
    """

    def __init__(self, fitted: "FittedModel", value: Any, batch_shape: torch.Size = torch.Size()) -> None:  # noqa: B008
        super().__init__()
        preprocessing = fitted.preprocessing
        others = [] if preprocessing is None else [each for each in preprocessing.columns or () if not each.is_plain]
        if others:
            raise ValueError(
                f"column {others[0].name!r} holds categories or gaps, but BoTorch moves along numbers: fit on columns "
                "of numbers without gaps, features=[...]."
            )
        self._head = fitted.gaussian_head
        self._fitted = fitted
        self._value = value
        self._batch_shape = batch_shape
        # FantasizeMixin asks whether noise is known for each example: it is not.
        self.likelihood = None

    @property
    def num_outputs(self) -> int:
        """Number of targets."""
        likelihood = self._fitted.model.likelihood
        return self._fitted.model.num_outputs // likelihood.num_outputs(1)

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of a batch of posteriors; empty but for fantasies."""
        return self._batch_shape

    def posterior(  # pyright: ignore[reportIncompatibleMethodOverride] - BoTorch's two classes differ from each other
        self,
        X: Tensor,  # noqa: N803 - the name is BoTorch's, as those of the others
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> Any:
        """Returns the joint distribution of the functions at some inputs.

        Args:
            X: Inputs, ``[*batch, q, d]``.
            output_indices: Targets that are wanted. None: all.
            observation_noise: Whether the noise is added, or its variance, ``[..., 1 or q, num_outputs]``.
            posterior_transform: Applied to the result.

        Returns:
            A ``GPyTorchPosterior`` with mean and variance of shape ``[*batch, q, num_outputs]``.
        """
        shape = torch.broadcast_shapes(X.shape[:-2], self._batch_shape)
        rows = self._encoded(X).expand(*shape, -1, -1).flatten(end_dim=-3) if shape else self._encoded(X).unsqueeze(0)
        fitted = self._fitted
        if self._batch_shape:
            moments = torch.func.vmap(fitted.joint_moments)(self._expanded(shape), rows)
        else:
            moments = torch.func.vmap(lambda each: fitted.joint_moments(self._value, each))(rows)
        mean, covariance, noise = (part.to(X.dtype).unflatten(0, shape or (1,)) for part in moments)
        variance = torch.diagonal(covariance, dim1=-2, dim2=-1)
        ridge = (_JITTER * variance.mean(-1, keepdim=True)).expand_as(variance)
        if isinstance(observation_noise, Tensor):
            ridge = ridge + observation_noise.mT.expand_as(variance)
        elif observation_noise:
            ridge = ridge + noise.unsqueeze(-1)
        covariance = covariance + torch.diag_embed(ridge)
        if not shape:
            mean, covariance = mean.squeeze(0), covariance.squeeze(0)
        if output_indices is not None:
            mean, covariance = mean[..., output_indices, :], covariance[..., output_indices, :, :]
        if mean.shape[-2] == 1:
            distribution = MultivariateNormal(mean.squeeze(-2), covariance.squeeze(-3))
        else:
            distribution = MultitaskMultivariateNormal.from_batch_mvn(MultivariateNormal(mean, covariance), task_dim=-1)
        found = GPyTorchPosterior(distribution)
        return found if posterior_transform is None else posterior_transform(posterior=found, X=X)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> "TaskModel":  # noqa: N803
        """Returns the model after further observations, exact and differentiable in them; see ``TaskPosterior.update``.

        Args:
            X: Inputs, ``[*batch, n, d]``.
            Y: Targets in the units of the data, ``[*batch, n, num_outputs]``; with more axes than ``X`` in front, as
                fantasies have, each gets a posterior of its own.
            **kwargs: None: the noise is that of the model.

        Raises:
            ValueError: If the noise of the observations is given, or the head needs all examples for an update.
        """
        if kwargs:
            raise ValueError(
                f"{', '.join(kwargs)}: observations have the noise that the model has learned, and no other settings: "
                "leave it out."
            )
        if not self._head.is_sequential:
            raise ValueError(
                f"algorithm {self._head.name!r}, as it is set, takes all examples for an update: use "
                "covariance='full' and centre=False, or update the posterior and call to_botorch again."
            )
        shape = torch.broadcast_shapes(X.shape[:-2], Y.shape[:-2], self._batch_shape)
        x, y = (part.expand(*shape, *part.shape[-2:]) for part in (self._encoded(X), self._encoded_targets(Y)))
        if not shape:
            return TaskModel(self._fitted, self._updated(self._value, x, y))
        size = math.prod(shape)
        x, y = (part.reshape(size, *part.shape[-2:]) for part in (x, y))
        if self._batch_shape:
            value = torch.func.vmap(self._updated)(self._expanded(shape), x, y)
        else:
            value = torch.func.vmap(lambda rows, targets: self._updated(self._value, rows, targets))(x, y)
        return TaskModel(self._fitted, value, shape)

    def _updated(self, value: Any, x: Tensor, y: Tensor) -> Any:
        fitted = self._fitted
        found = self._head.update(fitted.model, fitted.meta, value, Batch(x, y))
        assert found is not None, f"{self._head.name} is sequential"
        return found.value

    def _expanded(self, shape: torch.Size) -> Any:
        """Returns the posteriors of a batch of a larger shape, all axes together in front."""
        own = self._batch_shape

        def expand(leaf: Tensor) -> Tensor:
            return leaf.unflatten(0, own).expand(*shape, *leaf.shape[1:]).flatten(end_dim=len(shape) - 1)

        return tree.map(expand, self._value)

    def _encoded(self, x: Tensor) -> Tensor:
        """Returns inputs as the network takes them; what ``Preprocessing`` does, differentiably."""
        fitted = self._fitted
        if fitted.preprocessing is not None:
            scale = fitted.preprocessing.inputs
            x = (x.double() - scale.mean.to(x.device)) * scale.inverse_scale.to(x.device)
        return x.to(device=fitted.device, dtype=fitted.dtype)

    def _encoded_targets(self, y: Tensor) -> Tensor:
        fitted = self._fitted
        if fitted.preprocessing is not None and fitted.preprocessing.targets is not None:
            scale = fitted.preprocessing.targets
            y = (y.double() - scale.mean.to(y.device)) * scale.inverse_scale.to(y.device)
        return y.to(device=fitted.device, dtype=fitted.dtype)
