"""Characters in class folders, learned from one source and recognised in another.

``python -m benchmarks.across_sources --data FOLDER``. Rendered glyphs and handwritten Omniglot are written as folders
of class folders; a learner is trained on one and judged on unseen classes of both, beside nearest neighbours and
nearest class means in pixels, which learn from the task's own support alone.
"""

import dataclasses
import itertools
import platform
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro
from PIL import Image

from ibaml import MetaLearner, SplitSettings, tree
from ibaml.data import ClassImages, EpisodeSampler, load_class_folder, load_glyphs, load_omniglot
from ibaml.learner.folder import write_text
from ibaml.metrics import Estimate, estimate
from ibaml.recipes import get_recipe
from ibaml.train.evaluate import draw_tasks
from ibaml.types import Episode, Tensor

_ROOT = Path(__file__).resolve().parent.parent
_SPLITS = SplitSettings(num_ways=5, num_shots=5, num_query_images=15, image_size=28, channels=1)
_ALGORITHMS = {"iBaML": "glyphs_5way_5shot_ibaml", "MAML": "glyphs_5way_5shot_maml"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to compare.

    Attributes:
        data: Folder with the archives of Omniglot.
        num_steps: Meta-steps of each training run.
        num_tasks: Test tasks of each source.
        output: The result file; None: benchmarks/results/DATE-across-sources.md.
    """

    data: Path
    num_steps: int = 220
    num_tasks: int = 200
    output: Path | None = None


def main(arguments: Arguments) -> None:
    """Runs the comparison."""
    with TemporaryDirectory() as name:
        folders = {
            (source, split): write_class_folders(images, Path(name) / source / split)
            for source, by_split in _sources(arguments.data).items()
            for split, images in by_split.items()
        }
        lines = [
            _row("none", how, "-", {s: baseline(folders[s, "test"], how, arguments.num_tasks) for s in _names(folders)})
            for how in ("nearest neighbour", "nearest class mean")
        ]
        for trained_on in _names(folders):
            for algorithm, recipe_name in _ALGORITHMS.items():
                learner = _train(folders[trained_on, "train"], recipe_name, arguments.num_steps)
                reports = {
                    s: learner.evaluate(folders[s, "test"], num_tasks=arguments.num_tasks) for s in _names(folders)
                }
                nll = ", ".join(f"{source} {report['nll']}" for source, report in reports.items())
                accuracies = {source: report["accuracy"] for source, report in reports.items()}
                lines.append(_row(trained_on, algorithm, nll, accuracies))
                print(lines[-1], file=sys.stderr, flush=True)
    output = arguments.output or _ROOT / "benchmarks" / "results" / f"{date.today().isoformat()}-across-sources.md"
    write_text(output, _report(arguments, lines))
    print(f"Written to {output}", file=sys.stderr)


def write_class_folders(images: ClassImages, folder: Path) -> Path:
    """Writes a folder for each class, with its images as PNG files, and returns the folder."""
    for index, (start, stop) in enumerate(itertools.pairwise(images.class_start.tolist())):
        class_folder = folder / f"{index:04d}"
        class_folder.mkdir(parents=True)
        for number in range(start, stop):
            Image.fromarray(images.images[number, 0].numpy()).save(class_folder / f"{number - start}.png")
    return folder


def baseline(folder: Path, how: str, num_tasks: int) -> Estimate:
    """Returns the accuracy of a method that compares pixels, on tasks of unseen classes."""
    images = load_class_folder(folder, image_size=_SPLITS.image_size, channels=_SPLITS.channels)
    sampler = EpisodeSampler(
        images, num_ways=_SPLITS.num_ways, num_shots=_SPLITS.num_shots, num_queries=_SPLITS.num_query_images
    )
    tasks = draw_tasks(sampler, 0, num_tasks, seed=0)
    accuracies = [classify(tree.map(lambda leaf, i=i: leaf[i], tasks), how) for i in range(num_tasks)]
    return estimate(torch.stack(accuracies))


def classify(task: Episode, how: str) -> Tensor:
    """Returns the query accuracy of nearest neighbours, or of nearest class means, in pixels."""
    support, query = (part.x.flatten(1).double() for part in task)
    labels = task.support.y
    if how == "nearest class mean":
        support = torch.stack([support[labels == label].mean(0) for label in labels.unique()])
        labels = labels.unique()
    found = labels[torch.cdist(query, support).argmin(1)]
    return (found == task.query.y).double().mean()


def _sources(data: Path) -> Mapping[str, Mapping[str, ClassImages]]:
    return {
        "glyphs": {split: load_glyphs(split) for split in ("train", "test")},
        "Omniglot": {split: load_omniglot(split, root=data, rotations=False) for split in ("train", "test")},
    }


def _names(folders: Mapping[tuple[str, str], Path]) -> list[str]:
    return list(dict.fromkeys(source for source, _ in folders))


def _train(folder: Path, recipe_name: str, num_steps: int) -> MetaLearner:
    recipe = get_recipe(recipe_name)
    learner = MetaLearner(recipe.network.build(), recipe.algorithm, "categorical")
    settings = dataclasses.replace(recipe.trainer, num_steps=num_steps)
    return learner.fit(folder, splits=dataclasses.replace(_SPLITS, num_query_images=5), settings=settings)


def _row(trained_on: str, method: str, nll: str, accuracies: Mapping[str, Estimate]) -> str:
    cells = " | ".join(f"{100 * value.mean:.1f} +- {100 * value.half_width:.1f}" for value in accuracies.values())
    return f"| {trained_on} | {method} | {cells} | {nll} |"


def _report(arguments: Arguments, lines: list[str]) -> str:
    return "\n".join(
        [
            f"# Trained on one source, judged on another, {date.today():%d %B %Y}",
            "",
            f"`python -m benchmarks.across_sources --data FOLDER` on {platform.machine()}, Python "
            f"{platform.python_version()}, torch {torch.__version__}.",
            "",
            "Two sources as folders of class folders, 28 x 28 grey, ink white on black: glyphs rendered from fonts "
            "(test classes of other scripts than those of training) and Omniglot, drawn by hand (test characters of "
            f"the split of Vinyals et al.). 5-way 5-shot, {arguments.num_steps} meta-steps of 4 tasks with the network "
            f"and settings of the recipes of `make demo`, {arguments.num_tasks} test tasks with 15 queries a class; "
            "accuracy in percent with a 95% interval over tasks.",
            "",
            "| trained on | method | accuracy, glyphs | accuracy, Omniglot | nll |",
            "|---|---|---:|---:|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
