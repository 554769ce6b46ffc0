"""MetaLearner: the one object that most users need."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ibaml import tree
from ibaml.algorithms import Algorithm
from ibaml.algorithms.model import Model, build_model, num_outputs_of
from ibaml.algorithms.tail import last_layer
from ibaml.backbones import Backbone, Extractor, as_backbone
from ibaml.checks import require_int
from ibaml.data.prepare import SplitSettings, prepare
from ibaml.data.preprocessing import CLASS_SCOPES
from ibaml.learner import defaults
from ibaml.learner.choice import Choice
from ibaml.learner.features import prepare_features
from ibaml.learner.fine_tuning import TRAINER, restored, tuning
from ibaml.learner.fitting import LEAST_MINUTES, fit_model, pass_on_signal, require_targets, store_solved
from ibaml.learner.folder import read_model, write_model
from ibaml.learner.identity import data_identity
from ibaml.learner.predictor import Predictor
from ibaml.learner.run_folder import require_same_data
from ibaml.learner.selecting import select
from ibaml.learner.settings import LearnerSettings, as_patterns
from ibaml.learner.untrained import untrained
from ibaml.likelihoods import Likelihood, find_likelihood
from ibaml.networks import network_settings
from ibaml.posterior import FittedModel
from ibaml.train import TrainerSettings, TrainingResult
from ibaml.train.devices import resolve_device
from ibaml.train.processes import Processes
from ibaml.train.progress import console_of
from ibaml.types import ClassScope, ColumnName

if TYPE_CHECKING:
    from rich.console import Console


class MetaLearner(Predictor):
    """Learns from many small tasks how to learn a new one, and how sure to be of it.

    The constructor's arguments are kept as given (``get_params``), so that ``sklearn.base.clone`` gives an unfitted
    learner with the same settings.

    Args:
        network: Any ``nn.Module`` whose forward takes a batch of inputs. None: one that
            suits the data that ``fit`` gets (``ibaml.learner.defaults``). The module keeps its weights of before, also
            as ``learner.network``: what is learned is in ``meta_parameters``, what a task adapts in
            ``posterior.value``, and ``posterior.to_module()`` is a module with both.
        algorithm: ``"head"``: implicit Bayesian meta-learning of a prior over the last linear layer on shared
            features, solved exactly by the head that suits the likelihood. Or another name of ``ALGORITHMS``
            (``"ibaml"``: the paper's, on all weights; ``"maml"``, ...) with the settings of its publication or, for a
            default network on tables, of ``ibaml.learner.defaults``; or an ``Algorithm`` with settings of its own.
        likelihood: Name of a likelihood (``"categorical"``, ``"gaussian"``, ``"student_t"``, ``"poisson"``,
            ``"unit_gaussian"``) or one of ``ibaml.likelihoods`` with settings of its own. With a default network, the
            parameters of one that is named start at values that suit the data.
        adapt: Name patterns of the parameters that each task adapts, others being meta-learned directly; ``"*"`` is the
            last linear layer where the algorithm is a head, or the network the default one for tables.
        freeze: Name patterns of parameters that never change.
        classes: Labels of data: ``"shared"`` means the same in all tasks (active and inactive); ``"per_task"``: each
            task has classes of its own, as new classes of images are. Image folders are always the latter.
        backbone: A frozen feature extractor: any ``nn.Module``, callable or ``Backbone`` (with the size and scale of
            its images), or a name such as ``"timm:resnet50"`` (``named_backbone``). Inputs become its features, once,
            and ``network`` and head see these alone. It is not changed or stored: ``load`` wants it again.
        fine_tune: Name patterns of its parameters that all tasks learn with the prior, such as ``"layer4.*"``.
        device: Where to compute.
        verbose: Whether to show progress, with the time left, of all that takes more than two seconds. None: on a
            terminal; True: also in pipes and notebooks, by a line now and then; False: never. It may be changed later.
        seed: Seed of training, of the initial log-variances, of a default network, and of held-out tasks.

    Attributes:
        choice: Which of several default heads held-out tasks chose, with the scores of all, if any did; in one line
            by ``str``.

    Raises:
        TypeError: If the seed is no integer.
        ValueError: If a name is unknown, a pattern matches nothing, or there is no such device.
        ImportError, OSError: As of ``named_backbone``.

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> x = [rng.normal(size=(n, 3)) for n in (12, 9, 15)]
        >>> tasks = [(x_task, np.where(x_task[:, 0] > 0, "active", "inactive")) for x_task in x]
        >>> learner = MetaLearner().fit(tasks, num_steps=2)
        >>> prediction = learner.adapt(x[0][:6], tasks[0][1][:6]).predict(x[0][6:])
        >>> prediction.probs.shape, prediction.classes.tolist()
        ((6, 2), ['active', 'inactive'])
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        algorithm: str | Algorithm = "head",
        likelihood: str | Likelihood = "categorical",
        adapt: str | Sequence[str] = "*",
        *,
        freeze: str | Sequence[str] = (),
        classes: ClassScope = "shared",
        backbone: nn.Module | Callable[..., Any] | Backbone | str | None = None,
        fine_tune: str | Sequence[str] = (),
        device: torch.device | str = "cpu",
        verbose: bool | None = None,
        seed: int = 0,
    ) -> None:
        if classes not in CLASS_SCOPES:
            raise ValueError(f"classes must be 'shared' or 'per_task', but is {classes!r}.")
        if fine_tune and backbone is None:
            raise ValueError(f"fine_tune={fine_tune!r} names parameters of a backbone, and there is none.")
        by_position = {"network": network, "algorithm": algorithm, "likelihood": likelihood, "adapt": adapt}
        by_name = {"freeze": freeze, "classes": classes, "backbone": backbone, "fine_tune": fine_tune, "device": device}
        super().__init__(**by_position, **by_name, verbose=verbose, seed=seed)
        self.network = network
        self.likelihood = find_likelihood(likelihood)
        self.algorithm = defaults.find_algorithm(algorithm, self.likelihood, classes)
        self.adapt_patterns = adapt
        self.freeze_patterns = freeze
        self.classes: ClassScope = classes
        self.backbone = None if backbone is None else as_backbone(backbone)
        self.fine_tune = as_patterns(fine_tune)
        self.device = resolve_device(device)
        self.verbose = verbose
        self.seed = require_int("seed", seed)
        self.training_result: TrainingResult | None = None
        self.choice: Choice | None = None
        self._splits = SplitSettings()
        self._model: Model | None = None
        self._fitted: FittedModel | None = None
        if network is not None:
            self._build(network)

    @classmethod
    def from_settings(
        cls,
        settings: LearnerSettings,
        *,
        network: nn.Module | None = None,
        backbone: Any = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> "MetaLearner":
        """Builds an unfitted learner from its settings.

        Args:
            settings: What it is.
            network: The module, if the settings do not name one; by default built with initial weights from the seed.
            backbone: The feature extractor, as in the constructor.
            device: Where to compute.
            seed: Seed of the initial weights and of the learner.

        Raises:
            ValueError: If a setting is refused.
        """
        if network is None and settings.network is not None:
            network = settings.network.build(generator=torch.Generator().manual_seed(seed))
        return cls(network, **settings.arguments(), backbone=backbone, device=device, seed=seed)

    def __repr__(self) -> str:
        return f"{super().__repr__()}, {'not ' if self._fitted is None else ''}fitted"

    @property
    def model(self) -> Model:
        """Network and likelihood.

        Raises:
            NotFittedError: Before ``fit``, if no network was given.
        """
        return self._model if self._model is not None else self.fitted_model.model

    def fit(
        self,
        train_tasks: Any,
        validation_tasks: Any = None,
        *,
        task: ColumnName | None = None,
        target: ColumnName | Sequence[ColumnName] | None = None,
        features: Sequence[ColumnName] | None = None,
        formula: str | None = None,
        splits: SplitSettings | None = None,
        num_steps: int | None = None,
        settings: TrainerSettings | None = None,
        run_folder: str | Path | None = None,
        max_minutes: float | None = None,
        progress: "bool | Console | None" = None,
        processes: Processes | None = None,
    ) -> "MetaLearner":
        """Meta-trains on tasks and returns the learner itself.

        Args:
            train_tasks: A sequence of ``(X, y)`` pairs or a mapping from names to such pairs, of unequal sizes if need
                be; a table (pandas, polars, Arrow) with a row per example; a folder of class folders of images; a task
                sampler, or a sequence of Episodes. Features are scaled by their mean and standard deviation; columns of
                categories or with gaps become features as ``ibaml.data.columns`` says. All that is part of the model.
            validation_tasks: Likewise, of other tasks; the best state on them is kept. A share such as 0.2 holds out so
                many of the training tasks. None: the last state is kept.
            task: DataFrame: column that says which task a row belongs to.
            target: DataFrame: column or columns to predict.
            features: DataFrame: columns of the inputs. None: all others.
            formula: DataFrame: target and inputs in the notation of formulas, such as ``"score ~ ses + C(sector)"``, in
                place of ``target`` and ``features``; see ``ibaml.data.formulas``.
            splits: How tasks are split into support and query, afresh at every step.
            num_steps: Number of meta-steps; overrides that of ``settings``.
            settings: Settings of the outer loop. Their seed is the learner's unless they say otherwise.
            run_folder: Folder for the model, logs and checkpoints; training resumes from one that is there. The model
                is stored at every validation that improves it, so that ``MetaLearner.load`` can read it meanwhile.
            max_minutes: Time limit of this call.
            progress: As ``verbose`` of the constructor, which it overrides, or a console of one's own.
            processes: The processes that share each step's tasks, as ``ibaml.train.processes.connect`` gives them.

        Raises:
            ImportError: If there is a formula and formulaic is not installed.
            TypeError: If tasks are of no accepted form, or values of the wrong kind.
            ValueError: If a formula cannot be read, or a task does not fit the network or the likelihood, or cannot be
                split, or the run folder holds a run with other settings or other data, or there are more processes than
                tasks in a step.
            OSError: If the run folder cannot be written, or another training runs in it.
            TrainingDivergedError: If a loss or gradient is not finite.
            ProcessLostError: If another process has died or hangs.
            KeyboardInterrupt: If training was interrupted and there is no run folder. SIGTERM and SIGHUP are passed on
                to the program as well, after the running step and with all saved, which usually end it.
        """
        begun = time.monotonic()
        splits = splits or SplitSettings()
        console = console_of(self.verbose if progress is None else progress)
        extractor, read = None, prepare
        if self.backbone is not None:
            extractor = Extractor(self.backbone, self.device)
            read = functools.partial(prepare_features, extractor, console=console)
        how: dict[str, Any] = {
            "target_kind": self.likelihood.target_kind,
            "classes": self.classes,
            "splits": splits,
            "seed": self.seed,
            "dtype": torch.get_default_dtype() if self._model is None else tree.leaves(self._model.adapted)[0].dtype,
            "columns": {"task": task, "target": target, "features": features},
            "formula": formula,
        }
        tuned = None
        if self.fine_tune:
            assert extractor is not None
            given: dict[str, Any] = {"parameters": self._parameters, "algorithm": self.algorithm, "console": console}
            tuned = tuning(extractor, self.fine_tune, train_tasks, validation_tasks, how=how, **given)
            extractor, source = tuned.inputs, tuned.source
        else:
            source = read(train_tasks, validation_tasks, **how)
        folder = None if run_folder is None else Path(run_folder).expanduser()
        data = {} if folder is None else data_identity(source, splits)
        if folder is not None:
            (processes or Processes()).on_first(lambda: require_same_data(folder, data))
        scope: ClassScope = getattr(source.train, "class_scope", self.classes)
        self.algorithm = defaults.find_algorithm(self._parameters["algorithm"], self.likelihood, scope)
        require_targets(self.algorithm, self.likelihood, source.train)
        usual, start = defaults.trainer_settings(self.algorithm, source, seed=self.seed), None
        if tuned is not None:
            self._become(tuned.suited)
            usual = dataclasses.replace(TRAINER, seed=self.seed)
        elif self._parameters["network"] is None:
            candidates = defaults.suited_to(source.train, self._parameters, self.algorithm)
            selected = select(
                candidates,
                self._become,
                source,
                is_open=settings is None,
                num_steps=num_steps,
                splits=splits,
                seed=self.seed,
                device=self.device,
                max_minutes=max_minutes,
                processes=processes or Processes(),
                console=console,
            )
            model, self.choice, start = self._become(selected.suited), selected.choice, selected.start
            if selected.solved is not None:
                self._splits = splits
                self._fitted, self.training_result = store_solved(
                    model,
                    self.algorithm,
                    selected.solved,
                    source,
                    begun=begun,
                    console=console,
                    seed=self.seed,
                    data=data,
                    device=self.device,
                    run_folder=folder,
                    write=self._write,
                    processes=processes or Processes(),
                    backbone=extractor,
                )
                return self
            if max_minutes is not None:
                max_minutes = max(max_minutes - (time.monotonic() - begun) / 60, LEAST_MINUTES)
            usual = usual if selected.trainer is None else dataclasses.replace(selected.trainer, seed=self.seed)
        settings = settings or usual
        if num_steps is not None:
            settings = dataclasses.replace(settings, num_steps=num_steps)
        self._splits = splits
        self._fitted, self.training_result = fit_model(
            self.model,
            self.algorithm,
            source,
            settings,
            data=data,
            device=self.device,
            run_folder=folder,
            write=self._write,
            max_minutes=max_minutes,
            console=console,
            processes=processes or Processes(),
            backbone=extractor,
            start=start,
        )
        pass_on_signal(self.training_result, settings, run_folder)
        return self

    def fit_prior(self, inputs: Any, *, num_ways: int = 5, progress: "bool | Console | None" = None) -> "MetaLearner":
        """Sets the prior without training tasks, from the spread of the backbone's features, and returns the learner.

        For few-shot classes where there are no labelled classes to learn from: ``adapt`` then takes a few examples of
        each of any classes, and ``prediction.out_of_task`` says how much an input looks like none of these. Nothing is
        learned about which features tell classes apart; see ``ibaml.learner.untrained`` for what is assumed instead. It
        is less sure and less often right than after ``fit`` on related classes; ``calibrate`` helps if there are some.

        Args:
            inputs: Inputs of the backbone without labels, at least 20: images, lists of strings, arrays; or a folder of
                images, or of class folders of images.
            num_ways: Classes of a task in ``evaluate``; ``adapt`` takes any number.
            progress: As in ``fit``; one line says what the prior is.

        Raises:
            TypeError: If there is no backbone, or inputs are of no accepted form.
            ValueError: If classes are not of each task's own, or there are too few inputs.
        """
        if self.fine_tune:
            raise ValueError("fit_prior learns from no tasks, so that there is nothing to fine_tune: leave it out.")
        if self.backbone is None:
            raise TypeError("fit_prior needs a backbone, whose features make the prior: MetaLearner(backbone=...).")
        if self.likelihood.target_kind != "classes" or self.classes != "per_task":
            raise ValueError(
                "fit_prior is for classes that each task has of its own: MetaLearner(backbone=..., classes='per_task')."
            )
        extractor = Extractor(self.backbone, self.device)
        console = console_of(self.verbose if progress is None else progress)
        found = untrained(extractor, inputs, self.likelihood, num_ways=num_ways, console=console)
        model, self._splits = self._become(found.suited), SplitSettings()
        self._fitted = FittedModel(
            model=model,
            algorithm=self.algorithm,
            meta=self.algorithm.init(model.adapted, model.shared, generator=torch.Generator()),
            preprocessing=found.preprocessing,
            device=self.device,
            backbone=extractor,
        )
        return self

    def save(self, folder: str | Path) -> Path:
        """Saves the fitted learner as a folder of safetensors and JSON, readable without running code; returns it.

        Args:
            folder: Created if absent.

        Raises:
            NotFittedError: Before ``fit`` or ``load``.
            OSError: If the folder cannot be written.
        """
        return self._write(Path(folder).expanduser(), self.fitted_model)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        network: nn.Module | None = None,
        backbone: nn.Module | Callable[..., Any] | Backbone | str | None = None,
        device: torch.device | str = "cpu",
    ) -> "MetaLearner":
        """Loads a trained learner.

        Args:
            folder: What ``save`` or training wrote; of a run in progress, the best state so far.
            network: A module of the same architecture, needed unless the network was one of ``ibaml.networks``.
            backbone: The feature extractor that the learner was trained with, if it had one. A module or callable gets
                the settings of that time.
            device: Where to compute.

        Raises:
            FileNotFoundError: If there is no trained model, or one of its files is missing.
            ValueError: If a file is damaged, foreign or of another format, or belongs to another network or backbone.

        Warns:
            RuntimeWarning: If ``network`` has the weights of the one that was saved, but prints as something else.
        """
        stored = read_model(Path(folder).expanduser())
        extractor, network = restored(stored, backbone, network, torch.device(device), source=str(folder))
        own = None if extractor is None else extractor.backbone
        learner = cls.from_settings(stored.settings, network=network, backbone=own, device=device, seed=stored.seed)
        learner._splits, learner.choice = stored.splits, stored.choice
        learner.fine_tune = getattr(extractor, "patterns", ())
        fitted = stored.restore(learner.model, learner.algorithm, learner.device)
        learner._fitted = dataclasses.replace(fitted, backbone=extractor)
        return learner

    @property
    def settings(self) -> LearnerSettings:
        """The learner as a record; its network is None unless it is one of ``ibaml.networks``."""
        return LearnerSettings(
            network=None if self.network is None else network_settings(self.network),
            algorithm=self.algorithm,
            likelihood=self.likelihood,
            adapt=as_patterns(self.adapt_patterns),
            freeze=as_patterns(self.freeze_patterns),
            classes=self.classes,
        )

    def _write(self, folder: Path, fitted: FittedModel) -> Path:
        # By name: requires_grad=False freezes as well, which no pattern would tell.
        settings = dataclasses.replace(self.settings, freeze=tuple(sorted(fitted.model.frozen)))
        return write_model(folder, fitted, settings=settings, seed=self.seed, splits=self._splits, choice=self.choice)

    def _become(self, suited: defaults.Suited) -> Model:
        self.algorithm, self.likelihood, self.adapt_patterns = suited.algorithm, suited.likelihood, suited.adapt
        self._build(suited.network)
        return self.model

    def _build(self, network: nn.Module) -> None:
        likelihood = self.likelihood.with_outputs(num_outputs_of(network))
        self.network = network
        is_head = self.algorithm.uses_features or self._parameters["algorithm"] == defaults.HEAD
        if is_head and as_patterns(self.adapt_patterns) == ("*",):
            self.adapt_patterns = last_layer(network)
        built = build_model(network, likelihood, adapt=self.adapt_patterns, freeze=self.freeze_patterns)
        self._model = built.to(self.device)
