"""MetaLearner: the one object that most users need."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ibaml import __version__, records, tree
from ibaml.algorithms import RECORDS, Algorithm, MetaParameters, make_algorithm
from ibaml.calibration import fit_temperature
from ibaml.data.fixed_episodes import EpisodesInOrder
from ibaml.data.prepare import SplitSettings, image_sampler, is_folder, is_raw, prepare
from ibaml.data.preprocessing import CLASS_SCOPES, ClassScope, Preprocessing
from ibaml.evaluation import Evaluation, evaluate
from ibaml.learner import defaults
from ibaml.learner.folder import MODEL, read_model, write_model
from ibaml.likelihoods import GaussianNoise, make_likelihood
from ibaml.metrics import Estimate
from ibaml.model import Model, build_model
from ibaml.networks import NetworkSettings, network_settings
from ibaml.posterior import FittedModel, TaskPosterior, TemperedLikelihood
from ibaml.processes import Processes
from ibaml.table_evaluation import adapt_to_episodes, evaluate_tables, read_episodes
from ibaml.train.checkpoint import meta_from_tensors, meta_to_tensors
from ibaml.train.trainer import Trainer, TrainerSettings, TrainingResult
from ibaml.types import Episode, TaskSampler, Tensor

if TYPE_CHECKING:
    from rich.console import Console


__all__ = ["MODEL", "MetaLearner", "NotFittedError", "TaskPosterior"]


class NotFittedError(RuntimeError, ValueError, AttributeError):
    """The learner has no meta-parameters yet; of the types that scikit-learn's error of this name has, as well."""


class MetaLearner:
    """Learns from many small tasks how to learn a new one, and how sure to be of it.

    The constructor's arguments are kept as given (``get_params``), so that ``sklearn.base.clone`` gives an unfitted
    learner with the same settings.

    Args:
        network: Any ``nn.Module`` without running statistics whose forward takes a batch of inputs. None: one that
            suits the data that ``fit`` gets (``ibaml.learner.defaults``).
        algorithm: Name of an algorithm (``"ibaml"``, ``"maml"``, ``"fomaml"``, ``"imaml"``, ``"abml"``,
            ``"vampire"``) or an ``Algorithm`` with settings of its own. A name stands for the settings of the
            publication, or, for a default network on tables, for those of ``ibaml.learner.defaults``.
        likelihood: ``"categorical"`` or ``"gaussian"`` (regression, noise variance learned).
        adapt: Name patterns of the parameters that each task adapts; the others are meta-learned directly. With a
            default network on tables, ``"*"`` stands for its head.
        freeze: Name patterns of parameters that never change.
        classes: Labels of data: ``"shared"`` means the same in all tasks (active and inactive); ``"per_task"``: each
            task has classes of its own, as new classes of images are. Image folders are always the latter.
        device: Where to compute.
        seed: Seed of training, of the initial log-variances, of a default network, and of held-out tasks.

    Raises:
        ValueError: If a name is unknown or a pattern matches nothing.

    Examples:
        Arrays in, probabilities out:

        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> x = [rng.normal(size=(n, 3)) for n in (12, 9, 15)]
        >>> tasks = [(x_task, np.where(x_task[:, 0] > 0, "active", "inactive")) for x_task in x]
        >>> learner = MetaLearner().fit(tasks, num_steps=2)
        >>> prediction = learner.adapt(x[0][:6], tasks[0][1][:6]).predict(x[0][6:])
        >>> prediction.probs.shape, prediction.classes.tolist()
        ((6, 2), ['active', 'inactive'])

        A sampler of tensors and a network of one's own:

        >>> from ibaml.data import SinusoidTasks
        >>> from ibaml.networks import MLP
        >>> tasks = SinusoidTasks(num_shots=5, num_queries=5)
        >>> learner = MetaLearner(MLP(1, input_shape=1, hidden_sizes=(8,)), likelihood="gaussian")
        >>> learner = learner.fit(tasks, num_steps=2)
        >>> posterior = learner.adapt(torch.zeros(3, 1), torch.zeros(3, 1))
        >>> posterior.predict(torch.ones(2, 1)).mean.shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        algorithm: str | Algorithm = "ibaml",
        likelihood: str = "categorical",
        adapt: str | Sequence[str] = "*",
        *,
        freeze: str | Sequence[str] = (),
        classes: ClassScope = "shared",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        if classes not in CLASS_SCOPES:
            raise ValueError(f"classes must be 'shared' or 'per_task', but is {classes!r}.")
        self._parameters: dict[str, Any] = {
            "network": network,
            "algorithm": algorithm,
            "likelihood": likelihood,
            "adapt": adapt,
            "freeze": freeze,
            "classes": classes,
            "device": device,
            "seed": seed,
        }
        self.network = network
        self.algorithm = make_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
        self.likelihood = likelihood
        self.adapt_patterns = adapt
        self.freeze_patterns = freeze
        self.classes: ClassScope = classes
        self.device = torch.device(device)
        self.seed = seed
        self.preprocessing: Preprocessing | None = None
        self.calibration_temperature = 1.0
        self.training_result: TrainingResult | None = None
        self._splits = SplitSettings()
        self._meta: MetaParameters | None = None
        self._model: Model | None = None
        make_likelihood(likelihood, 1)
        if network is not None:
            self._build(network)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Returns the constructor's arguments as they were given.

        Args:
            deep: Not used; there are no nested learners.
        """
        del deep
        return dict(self._parameters)

    def set_params(self, **parameters: Any) -> "MetaLearner":
        """Changes constructor arguments and forgets what was fitted.

        Raises:
            ValueError: If there is no such argument, or its value is refused.
        """
        if unknown := sorted(set(parameters) - set(self._parameters)):
            raise ValueError(
                f"MetaLearner has no parameter {', '.join(unknown)}; there are {', '.join(self._parameters)}."
            )
        MetaLearner.__init__(self, **{**self._parameters, **parameters})
        return self

    @property
    def model(self) -> Model:
        """Network and likelihood.

        Raises:
            NotFittedError: Before ``fit``, if no network was given.
        """
        return self._model if self._model is not None else self._refuse_unfitted()

    @property
    def meta_parameters(self) -> MetaParameters:
        """The learned prior and shared parameters.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
        """
        return self._meta if self._meta is not None else self._refuse_unfitted()

    @property
    def fitted_model(self) -> FittedModel:
        """What adaptation and prediction need, as one immutable value.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
        """
        meta, model = self.meta_parameters, self.model
        if self.calibration_temperature != 1.0:
            likelihood = TemperedLikelihood(model.likelihood, self.calibration_temperature)
            model = dataclasses.replace(model, likelihood=likelihood)
        return FittedModel(
            model=model, algorithm=self.algorithm, meta=meta, preprocessing=self.preprocessing, device=self.device
        )

    def fit(
        self,
        train_tasks: Any,
        validation_tasks: Any = None,
        *,
        task: str | None = None,
        target: str | Sequence[str] | None = None,
        features: Sequence[str] | None = None,
        splits: SplitSettings | None = None,
        num_steps: int | None = None,
        settings: TrainerSettings | None = None,
        run_folder: str | Path | None = None,
        max_minutes: float | None = None,
        progress: bool = False,
        processes: Processes | None = None,
    ) -> "MetaLearner":
        """Meta-trains on tasks.

        Args:
            train_tasks: A sequence of ``(X, y)`` pairs or a mapping from names to such pairs, of unequal sizes if need
                be; a pandas DataFrame with a row per example; the path of a folder of class folders of images; a task
                sampler, or a sequence of Episodes. Arrays and tables are scaled by their mean and standard deviation,
                which become part of the model.
            validation_tasks: Likewise, of other tasks; the best state on them is kept. A share such as 0.2 holds out so
                many of the training tasks. None: the last state is kept.
            task: DataFrame: column that says which task a row belongs to.
            target: DataFrame: column or columns to predict.
            features: DataFrame: columns of the inputs. None: all others.
            splits: How tasks are split into support and query, afresh at every step.
            num_steps: Number of meta-steps; overrides that of ``settings``.
            settings: Settings of the outer loop. Their seed is the learner's unless they say otherwise.
            run_folder: Folder for logs and checkpoints; training resumes from one that is there.
            max_minutes: Time limit of this call.
            progress: Show a progress bar.
            processes: The processes that share each step's tasks, as ``ibaml.processes.connect`` gives them.

        Returns:
            The learner itself.

        Raises:
            TypeError: If tasks are of no accepted form, or values of the wrong kind.
            ValueError: If a task does not fit the network or the likelihood, or cannot be split, or there are more
                processes than tasks in a step.
            TrainingDivergedError: If a loss or gradient is not finite.
            ProcessLostError: If another process has died or hangs.
        """
        splits = splits or SplitSettings()
        source = prepare(
            train_tasks,
            validation_tasks,
            is_regression=self.likelihood != "categorical",
            classes=self.classes,
            splits=splits,
            seed=self.seed,
            dtype=torch.float32 if self._model is None else tree.leaves(self._model.adapted)[0].dtype,
            columns={"task": task, "target": target, "features": features},
        )
        is_table = source.preprocessing is not None and source.preprocessing.image_size is None
        settings = settings or dataclasses.replace(
            defaults.TABLE_TRAINER if is_table else TrainerSettings(), seed=self.seed
        )
        if num_steps is not None:
            settings = dataclasses.replace(settings, num_steps=num_steps)
        if self._parameters["network"] is None:
            self._build_default(source.train, is_image=source.preprocessing is not None and not is_table)
        trainer = Trainer(
            self.model,
            self.algorithm,
            settings,
            run_folder=None if run_folder is None else Path(run_folder),
            device=self.device,
            console=_console() if progress else None,
            processes=processes,
        )
        self.training_result = trainer.fit(source.train, source.validation, max_minutes=max_minutes)
        self._meta = self.training_result.meta
        self.preprocessing, self._splits, self.calibration_temperature = source.preprocessing, splits, 1.0
        return self

    def adapt(self, x_support: Any, y_support: Any, *, seed: int = 0) -> TaskPosterior:
        """Adapts to one task.

        Args:
            x_support: Inputs, ``[num_examples, *input_shape]``, or a DataFrame with the columns of training.
            y_support: Labels or targets as in training; for a learner fitted on tensors class indices
                ``[num_examples]`` or targets ``[num_examples, num_outputs]``.
            seed: Seed of the noise of the inner problem.

        Returns:
            The posterior of the task; ``update`` takes in more examples later.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            TypeError: If values are of the wrong kind.
            ValueError: If the examples do not fit the network or the likelihood.
            MemoryError: If the support set is too large for the memory at hand.

        Cost:
            ``num_steps + 1`` gradients of the inner solver.
        """
        return self.fitted_model.adapt(x_support, y_support, seed=seed)

    def calibrate(self, validation_tasks: Any, *, num_tasks: int = 200, seed: int = 0) -> "MetaLearner":
        """Fits one temperature on held-out tasks, by which all later predictions are made more or less sure.

        For classes it divides the logits of the averaged probabilities; for regression it multiplies all standard
        deviations.

        Args:
            validation_tasks: Tasks that training has not seen, in the form that ``fit`` took.
            num_tasks: Number of tasks to draw from a sampler or an image folder; others are used once each.
            seed: Seed of the splits.

        Returns:
            The learner itself, with ``calibration_temperature`` set.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            ValueError: If a task does not fit.
        """
        fitted = dataclasses.replace(self.fitted_model, model=self.model)
        episodes = read_episodes(fitted, validation_tasks, self._splits, num_tasks=num_tasks, seed=seed)
        predictions, targets = adapt_to_episodes(fitted, episodes, seed=seed)
        self.calibration_temperature = fit_temperature(predictions, targets)
        return self

    def evaluate(self, test_tasks: Any, *, num_tasks: int = 600, seed: int = 0) -> dict[str, Estimate]:
        """Adapts to test tasks and reports metrics with 95% intervals over tasks.

        Args:
            test_tasks: Tasks in the form that ``fit`` took. Data, and sequences of Episodes, are used once each, data
                with half of a task as support unless the ``splits`` of ``fit`` said otherwise.
            num_tasks: Number of tasks to draw from a sampler or an image folder.
            seed: Names the fixed set of tasks, or the splits.

        Returns:
            For classes ``accuracy``, ``nll``, ``brier``, ``ece``, ``mce``, ``selective_area`` and, of the examples of
            all tasks together, ``ece_pooled`` and ``mce_pooled``. For regression ``mse`` and ``nll`` in the targets'
            units, ``coverage_90`` of the exact 90% interval, and ``quantile_calibration_error``.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            ValueError: If a task does not fit.
        """
        fitted = self.fitted_model
        if self.preprocessing is None or is_raw(test_tasks) or is_folder(test_tasks):
            return dict(self.evaluate_in_full(test_tasks, num_tasks=num_tasks, seed=seed).report)
        episodes = read_episodes(fitted, test_tasks, self._splits, num_tasks=num_tasks, seed=seed)
        return evaluate_tables(fitted, episodes, seed=seed)

    def evaluate_in_full(
        self, test_tasks: TaskSampler | Sequence[Episode] | str | Path, *, num_tasks: int = 600, seed: int = 0
    ) -> Evaluation:
        """Like ``evaluate``, for samplers, Episodes and image folders; returns per-task metrics and predictions too."""
        fitted = self.fitted_model
        if isinstance(test_tasks, str | Path):
            if self.preprocessing is None or self.preprocessing.image_size is None:
                raise ValueError(f"test_tasks is the folder {test_tasks}, but the model was not trained on images.")
            test_tasks = image_sampler(self.preprocessing, test_tasks, self._splits)
        if isinstance(test_tasks, Sequence):
            num_tasks = len(test_tasks)
        sampler = EpisodesInOrder(test_tasks) if isinstance(test_tasks, Sequence) else test_tasks
        return evaluate(fitted.model, self.algorithm, self.meta_parameters, sampler, num_tasks=num_tasks, seed=seed)

    def save(self, folder: str | Path) -> Path:
        """Saves the fitted learner as a folder of safetensors and JSON, readable without running code.

        Args:
            folder: Created if absent.

        Returns:
            The folder, for ``MetaLearner.load``.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            OSError: If the folder cannot be written.
        """
        meta = self.meta_parameters
        assert self.network is not None
        network = network_settings(self.network)
        settings: dict[str, Any] = {
            "version": __version__,
            "network": None if network is None else dataclasses.asdict(network),
            "algorithm": records.to_json(self.algorithm),
            "likelihood": self.likelihood,
            "adapt": self.adapt_patterns,
            # By name: requires_grad=False freezes as well, which no pattern would tell.
            "freeze": sorted(self.model.frozen),
            "classes": self.classes,
            "seed": self.seed,
            "splits": dataclasses.asdict(self._splits),
            "calibration_temperature": self.calibration_temperature,
            "preprocessing": None if self.preprocessing is None else self.preprocessing.settings(),
        }
        scales = {} if self.preprocessing is None else self.preprocessing.tensors()
        tensors = meta_to_tensors(meta) | self._fixed_tensors()
        return write_model(
            Path(folder), tensors | {f"preprocessing/{name}": value for name, value in scales.items()}, settings
        )

    @classmethod
    def load(
        cls, folder: str | Path, *, network: nn.Module | None = None, device: torch.device | str = "cpu"
    ) -> "MetaLearner":
        """Loads a saved learner.

        Args:
            folder: What ``save`` wrote.
            network: A module of the same architecture, needed unless the network was one of ``ibaml.networks``.
            device: Where to compute.

        Raises:
            FileNotFoundError: If there is no saved learner, or one of its files is missing.
            ValueError: If a file is damaged, foreign or of a newer format, or belongs to another network.
        """
        path = Path(folder) / MODEL
        tensors, metadata = read_model(Path(folder))
        if network is None:
            if metadata["network"] is None:
                raise ValueError(
                    f"{path} holds a network that is not one of ibaml.networks: pass a module of the same "
                    "architecture, MetaLearner.load(folder, network=...)."
                )
            dtype = next(value.dtype for name, value in tensors.items() if name.startswith("prior"))
            network = NetworkSettings(**metadata["network"]).build().to(dtype)
        learner = cls(
            network,
            records.from_json(metadata["algorithm"], RECORDS),
            metadata["likelihood"],
            metadata["adapt"],
            freeze=metadata["freeze"],
            classes=metadata.get("classes", "shared"),
            device=device,
            seed=metadata.get("seed", 0),
        )
        like = learner.algorithm.init(learner.model.adapted, learner.model.shared, generator=torch.Generator())
        learner._meta = meta_from_tensors(tensors, like=like, source=str(path))
        for name, value in learner._fixed_tensors().items():
            if name not in tensors or tensors[name].shape != value.shape:
                came = f"has shape {tuple(tensors[name].shape)}" if name in tensors else "is missing"
                raise ValueError(
                    f"{path} belongs to another network: {name} {came}, the model's has shape {tuple(value.shape)}."
                )
            value.copy_(tensors[name])
        learner.calibration_temperature = metadata.get("calibration_temperature", 1.0)
        if metadata.get("preprocessing") is not None:
            prefix = "preprocessing/"
            scales = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            learner.preprocessing = Preprocessing.restore(metadata["preprocessing"], scales)
            learner._splits = SplitSettings(**metadata["splits"])
        return learner

    def to_input(self, x: Tensor) -> Tensor:
        """Moves inputs to the learner's device, and real ones to the dtype of its weights."""
        like = tree.leaves(self.model.adapted)[0]
        return x.to(device=self.device, dtype=like.dtype if x.is_floating_point() else None)

    def _build(self, network: nn.Module, *, is_default: bool = False) -> None:
        num_outputs = int(getattr(network, "num_outputs", 1))
        likelihood = make_likelihood(self.likelihood, num_outputs)
        if is_default and type(likelihood) is GaussianNoise:
            likelihood = GaussianNoise(num_outputs, defaults.NOISE_VARIANCE)
        self.network = network
        built = build_model(network, likelihood, adapt=self.adapt_patterns, freeze=self.freeze_patterns)
        self._model = built.to(self.device)

    def _build_default(self, tasks: TaskSampler, *, is_image: bool) -> None:
        shape, algorithm = tasks.input_shape, self._parameters["algorithm"]
        if not is_image:
            self.adapt_patterns = defaults.HEAD if self._parameters["adapt"] == "*" else self._parameters["adapt"]
            self.algorithm = (
                defaults.table_algorithm(algorithm, shape, is_regression=self.likelihood == "gaussian")
                if isinstance(algorithm, str)
                else algorithm
            )
        network = defaults.default_network(shape, tasks.num_outputs, is_image=is_image, seed=self.seed)
        self._build(network, is_default=True)

    def _refuse_unfitted(self) -> Any:
        raise NotFittedError("this MetaLearner has not been fitted: call fit(train_tasks) or MetaLearner.load first.")

    def _fixed_tensors(self) -> dict[str, Tensor]:
        """Returns what training leaves alone but predictions depend on: frozen parameters and the module's buffers."""
        frozen = {f"frozen/{name}": value for name, value in self.model.frozen.items()}
        return frozen | {f"buffer/{name}": value for name, value in self.model.network.named_buffers()}


def _console() -> "Console":
    from rich.console import Console  # only for those who want to see the progress

    return Console(stderr=True)
