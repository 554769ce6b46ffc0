"""MetaLearner: the one object that most users need."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ibaml import __version__, tree
from ibaml.algorithms import Algorithm, MetaParameters, make_algorithm
from ibaml.checkpoint import load_tensors, meta_from_tensors, meta_to_tensors, save_tensors
from ibaml.data.fixed_episodes import FixedEpisodes
from ibaml.evaluation import Evaluation, evaluate, predict
from ibaml.gaussian import DiagonalGaussian
from ibaml.likelihoods import make_likelihood
from ibaml.metrics import Estimate
from ibaml.model import build_model
from ibaml.networks import NetworkSettings, network_settings
from ibaml.prediction import ClassPrediction, RegressionPrediction
from ibaml.processes import Processes
from ibaml.trainer import Trainer, TrainerSettings, TrainingResult
from ibaml.types import Batch, Episode, Params, TaskSampler, Tensor

MODEL = "model.safetensors"


class NotFittedError(RuntimeError):
    """The learner has no meta-parameters yet."""


class TaskPosterior:
    """What a learner knows about one task after adaptation.

    Attributes:
        value: Adapted weights, or a DiagonalGaussian over them.
        grad_norm: Norm of the inner gradient at ``value``; near zero when adaptation has converged.
    """

    def __init__(self, learner: "MetaLearner", value: Params | DiagonalGaussian, grad_norm: float) -> None:
        self._learner = learner
        self.value = value
        self.grad_norm = grad_norm

    def predict(self, x_query: Tensor, *, seed: int = 0) -> ClassPrediction | RegressionPrediction:
        """Predicts at new inputs of the task.

        Args:
            x_query: Inputs, ``[num_examples, *input_shape]``.
            seed: Seed of the weight samples.

        Returns:
            A prediction with ``.probs`` (classes) or ``.mean`` (regression), ``.total_uncertainty``, ``.aleatoric``,
            ``.epistemic`` and ``.samples()``.

        Raises:
            TypeError: If the inputs are no tensor.
            ValueError: If the inputs hold NaN or do not fit the network.

        Cost:
            ``num_evaluation_samples`` forward passes.
        """
        learner = self._learner
        model, meta = learner.model, learner.meta_parameters
        x_query = learner.to_input(_require_tensor("x_query", x_query))
        model.check_inputs("x_query", x_query)
        noise = learner.algorithm.draw_evaluation_noise(meta, generator=torch.Generator().manual_seed(seed))
        try:
            with torch.no_grad():
                return predict(model, learner.algorithm, meta, self.value, x_query, noise)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(
                f"the network ({type(model.network).__name__}) cannot process x_query of shape {tuple(x_query.shape)} "
                f"and dtype {x_query.dtype}: {error}"
            ) from error


class MetaLearner:
    """Learns from many small tasks how to learn a new one, and how sure to be of it.

    Args:
        network: Any ``nn.Module`` without running statistics whose forward takes a batch of inputs.
        algorithm: Name of an algorithm (``"ibaml"``, ``"maml"``, ``"fomaml"``, ``"imaml"``, ``"abml"``,
            ``"vampire"``) or an ``Algorithm`` with settings of its own.
        likelihood: ``"categorical"`` or ``"gaussian"`` (regression, noise variance learned).
        adapt: Name patterns of the parameters that each task adapts; the others are meta-learned directly.
        freeze: Name patterns of parameters that never change.
        device: Where to compute.
        seed: Seed of training, and of the initial log-variances.

    Raises:
        ValueError: If a name is unknown or a pattern matches nothing.

    Examples:
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
        network: nn.Module,
        algorithm: str | Algorithm = "ibaml",
        likelihood: str = "categorical",
        adapt: str | Sequence[str] = "*",
        *,
        freeze: str | Sequence[str] = (),
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self.network = network
        self.algorithm = make_algorithm(algorithm) if isinstance(algorithm, str) else algorithm
        self.likelihood = likelihood
        self.adapt_patterns = adapt
        self.freeze_patterns = freeze
        self.device = torch.device(device)
        self.seed = seed
        num_outputs = int(getattr(network, "num_outputs", 1))
        built = build_model(network, make_likelihood(likelihood, num_outputs), adapt=adapt, freeze=freeze)
        self.model = built.to(self.device)
        self.training_result: TrainingResult | None = None
        self._meta: MetaParameters | None = None

    @property
    def meta_parameters(self) -> MetaParameters:
        """The learned prior and shared parameters.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
        """
        if self._meta is None:
            raise NotFittedError(
                "this MetaLearner has not been fitted: call fit(train_tasks) or MetaLearner.load first."
            )
        return self._meta

    def fit(
        self,
        train_tasks: TaskSampler | Sequence[Episode],
        validation_tasks: TaskSampler | Sequence[Episode] | None = None,
        *,
        num_steps: int | None = None,
        settings: TrainerSettings | None = None,
        run_folder: str | Path | None = None,
        max_minutes: float | None = None,
        progress: bool = False,
        processes: Processes | None = None,
    ) -> "MetaLearner":
        """Meta-trains on tasks.

        Args:
            train_tasks: A task sampler, or a sequence of episodes.
            validation_tasks: Likewise, of other tasks; the best state on them is kept. None: the last state is.
            num_steps: Number of meta-steps; overrides that of ``settings``.
            settings: Settings of the outer loop. Their seed is the learner's unless they say otherwise.
            run_folder: Folder for logs and checkpoints; training resumes from one that is there.
            max_minutes: Time limit of this call.
            progress: Show a progress bar.
            processes: The processes that share each step's tasks, as ``ibaml.processes.connect`` gives them.

        Returns:
            The learner itself.

        Raises:
            ValueError: If a task does not fit the network or the likelihood, or there are more processes than tasks in
                a step.
            TrainingDivergedError: If a loss or gradient is not finite.
            ProcessLostError: If another process has died or hangs.
        """
        settings = settings or TrainerSettings(seed=self.seed)
        if num_steps is not None:
            settings = dataclasses.replace(settings, num_steps=num_steps)
        trainer = Trainer(
            self.model,
            self.algorithm,
            settings,
            run_folder=None if run_folder is None else Path(run_folder),
            device=self.device,
            console=Console(stderr=True) if progress else None,
            processes=processes,
        )
        validation = None if validation_tasks is None else _as_sampler(validation_tasks)
        self.training_result = trainer.fit(_as_sampler(train_tasks), validation, max_minutes=max_minutes)
        self._meta = self.training_result.meta
        return self

    def adapt(self, x_support: Tensor, y_support: Tensor, *, seed: int = 0) -> TaskPosterior:
        """Adapts to one task.

        Args:
            x_support: Inputs, ``[num_examples, *input_shape]``.
            y_support: Class indices ``[num_examples]``, or targets ``[num_examples, num_outputs]``.
            seed: Seed of the noise of the inner problem.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            TypeError: If an argument is no tensor.
            ValueError: If the examples do not fit the network or the likelihood.

        Cost:
            ``num_inner_steps + 1`` gradients.
        """
        meta = self.meta_parameters
        x_support, y_support = _require_tensor("x_support", x_support), _require_tensor("y_support", y_support)
        support = Batch(self.to_input(x_support), y_support.to(self.device))
        self.model.check_task(Episode(support, support), task="the task's")
        noise = self.algorithm.draw_noise(meta, generator=torch.Generator().manual_seed(seed))
        solution = self.algorithm.adapt(self.model.nll, meta, support, noise)
        return TaskPosterior(self, solution.value, float(solution.grad_norm))

    def evaluate(
        self, test_tasks: TaskSampler | Sequence[Episode], *, num_tasks: int = 600, seed: int = 0
    ) -> dict[str, Estimate]:
        """Adapts to test tasks and reports metrics with 95% intervals over tasks.

        Args:
            test_tasks: A task sampler, or a sequence of episodes (each is used once).
            num_tasks: Number of tasks to draw from a sampler.
            seed: Names the fixed set of tasks.

        Returns:
            ``accuracy``, ``nll``, ``brier``, ``ece``, ``mce`` and pooled calibration errors, or ``mse``, ``nll`` and
            ``coverage_90``.
        """
        return dict(self.evaluate_in_full(test_tasks, num_tasks=num_tasks, seed=seed).report)

    def evaluate_in_full(
        self, test_tasks: TaskSampler | Sequence[Episode], *, num_tasks: int = 600, seed: int = 0
    ) -> Evaluation:
        """Like ``evaluate``, but returns per-task metrics and predictions as well."""
        if isinstance(test_tasks, Sequence):
            num_tasks = len(test_tasks)
        sampler = _InOrder(test_tasks) if isinstance(test_tasks, Sequence) else test_tasks
        return evaluate(self.model, self.algorithm, self.meta_parameters, sampler, num_tasks=num_tasks, seed=seed)

    def save(self, folder: str | Path) -> Path:
        """Saves the fitted learner as one safetensors file with JSON settings, readable without running code.

        Args:
            folder: Created if absent.

        Returns:
            The file.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            OSError: If the folder cannot be written.
        """
        meta = self.meta_parameters
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = network_settings(self.network)
        metadata = {
            "version": __version__,
            "network": None if settings is None else dataclasses.asdict(settings),
            "algorithm": dataclasses.asdict(self.algorithm),
            "likelihood": self.likelihood,
            "adapt": self.adapt_patterns,
            # By name: requires_grad=False freezes as well, which no pattern would tell.
            "freeze": sorted(self.model.frozen),
        }
        save_tensors(folder / MODEL, meta_to_tensors(meta) | self._fixed_tensors(), metadata)
        return folder / MODEL

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
            FileNotFoundError: If there is no saved learner.
            ValueError: If the file is damaged or foreign, or belongs to another network.
        """
        path = Path(folder) / MODEL
        tensors, metadata = load_tensors(path)
        if "likelihood" not in metadata:
            raise ValueError(f"{path} is no saved MetaLearner: it was not written by MetaLearner.save.")
        if network is None:
            if metadata["network"] is None:
                raise ValueError(
                    f"{path} holds a network that is not one of ibaml.networks: pass a module of the same "
                    "architecture, MetaLearner.load(folder, network=...)."
                )
            dtype = next(value.dtype for name, value in tensors.items() if name.startswith("prior"))
            network = NetworkSettings(**metadata["network"]).build().to(dtype)
        algorithm = dict(metadata["algorithm"])
        algorithm["initial_log_var"] = tuple(algorithm["initial_log_var"])
        learner = cls(
            network,
            Algorithm(**algorithm),
            metadata["likelihood"],
            metadata["adapt"],
            freeze=metadata["freeze"],
            device=device,
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
        return learner

    def _fixed_tensors(self) -> dict[str, Tensor]:
        """Returns what training leaves alone but predictions depend on: frozen parameters and the module's buffers."""
        frozen = {f"frozen/{name}": value for name, value in self.model.frozen.items()}
        return frozen | {f"buffer/{name}": value for name, value in self.model.network.named_buffers()}

    def to_input(self, x: Tensor) -> Tensor:
        """Moves inputs to the learner's device, and real ones to the dtype of its weights."""
        like = tree.leaves(self.model.adapted)[0]
        return x.to(device=self.device, dtype=like.dtype if x.is_floating_point() else None)


class _InOrder(FixedEpisodes):
    """Yields a sequence of episodes in order, once."""

    def __init__(self, episodes: Sequence[Episode]) -> None:
        super().__init__(episodes)
        self._next = 0

    def sample(self, num_tasks: int, *, generator: torch.Generator) -> Episode:
        del generator
        chosen = self.episodes[self._next : self._next + num_tasks]
        self._next += num_tasks
        return tree.map(lambda *leaves: torch.stack(leaves), *chosen)


def _require_tensor(argument: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{argument} must be a torch.Tensor, got {type(value).__name__}; convert it with torch.as_tensor."
        )
    return value


def _as_sampler(tasks: Any) -> TaskSampler:
    return FixedEpisodes(tasks) if isinstance(tasks, Sequence) else tasks
