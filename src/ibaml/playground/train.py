"""Makes the models that the playground shows: ``python -m ibaml.playground.train``, a minute on one core.

| folder of ``models`` | what |
|---|---|
| drawings | the recipe ``glyphs_5way_5shot``, with thresholds for "none of these" from validation classes |
| curves | a prior of sinusoids, estimated in closed form |

``page/fields.csv``, the example of the tab *Table*, is made as well.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from ibaml.atomic import write_text
from ibaml.data import load_glyphs
from ibaml.data.sources import Sinusoid
from ibaml.learner import MetaLearner
from ibaml.playground.none_of_these import find_thresholds
from ibaml.recipes import get_recipe, load_learner, runs

MODELS = Path(__file__).parent / "models"
FIELDS = Path(__file__).parent / "page" / "fields.csv"
DRAWINGS, CURVES = "drawings", "curves"
RECIPE = "glyphs_5way_5shot"

NUM_CURVES, POINTS_A_CURVE, CURVE_NOISE = 150, 15, 0.2


def curves_for_training(
    num_curves: int = NUM_CURVES, *, seed: int = 0
) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """Returns noisy points of sinusoids of random amplitude and phase, as pairs ``(x, y)`` of arrays."""
    sampler = Sinusoid(num_shots=POINTS_A_CURVE, noise_std=CURVE_NOISE).sampler("train")
    points = sampler.sample(num_curves, generator=torch.Generator().manual_seed(seed)).support
    return [(x.numpy(), y.squeeze(-1).numpy()) for x, y in zip(points.x, points.y, strict=True)]


def train_curves(folder: Path) -> MetaLearner:
    """Estimates the prior of sinusoids and saves it."""
    learner = MetaLearner(likelihood="gaussian").fit(curves_for_training(), 0.2)
    learner.save(folder)
    return learner


def train_drawings(folder: Path, *, console: Console | None = None) -> MetaLearner:
    """Trains the recipe of characters, finds the thresholds, and saves both."""
    with tempfile.TemporaryDirectory() as run:
        runs.train_run(get_recipe(RECIPE), Path(run), console=console)
        # With what the recipe knows of pictures: that white is 255.
        learner = load_learner(run)
    learner.save(folder)
    find_thresholds(learner, load_glyphs("validation")).save(folder)
    return learner


def fields(*, num_known: int = 16, num_new: int = 2, seed: int = 0) -> str:
    """Returns plots of fields as CSV: nitrogen in kg/ha, water in mm, and the yield in t/ha.

    A yield is ``top - ((nitrogen - best) / 70)^2 - ((water - enough) / 150)^2`` and noise of 0.2; top, best and enough
    differ from field to field. Of the last fields three plots are harvested, and six yields are missing.

    Args:
        num_known: Fields of nine plots whose yields are all known.
        num_new: Fields after them.
        seed: Seed of the numbers.
    """
    random = np.random.default_rng(seed)
    lines = ["field,nitrogen,water,yield"]
    for number in range(num_known + num_new):
        top, best, enough = random.normal(8, 1), random.normal(120, 25), random.normal(300, 40)
        for plot in range(9):
            nitrogen, water = round(random.uniform(0, 240)), round(random.uniform(100, 500))
            harvest = top - ((nitrogen - best) / 70) ** 2 - ((water - enough) / 150) ** 2 + random.normal(0, 0.2)
            is_missing = number >= num_known and plot >= 3
            name = f"new {number - num_known + 1}" if number >= num_known else f"field {number + 1}"
            lines.append(f"{name},{nitrogen},{water},{'' if is_missing else f'{harvest:.2f}'}")
    return "\n".join(lines) + "\n"


def main(folder: Path = MODELS) -> None:
    """Makes all models anew, and the example table."""
    console = Console(stderr=True)
    write_text(FIELDS, fields())
    train_curves(folder / CURVES)
    train_drawings(folder / DRAWINGS, console=console)
    console.print(f"The models of the playground are in {folder}.", soft_wrap=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
