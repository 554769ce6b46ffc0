"""Which molecules are active in a new assay, of which sixteen have been measured? Beside logistic regression.

Assays resemble each other: the same parts of a molecule matter in many. A prior over the weights of an assay learns
that from other assays. The data is FS-Mol's, if `fsmol_train_valid.npz` is in `--data` or `$IBAML_DATA`; otherwise it
is made up. For the whole of FS-Mol there is `ibaml train fsmol`, and docs/evidence-molecules.md.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from ibaml import MetaLearner, SplitSettings
from ibaml.data import load_assays

NUM_KNOWN, NUM_ROWS, NUM_BITS = 16, 64, 64
Assay = tuple[np.ndarray, np.ndarray]


def made_up(num_assays: int, seed: int) -> list[Assay]:
    """Assays of count fingerprints, in which the same three patterns of bits matter, each time in another way."""
    patterns = np.random.default_rng(0).normal(size=(3, NUM_BITS)) / 4
    rng = np.random.default_rng(seed)
    assays = []
    for _ in range(num_assays):
        counts = rng.poisson(0.4, (NUM_ROWS, NUM_BITS))
        x = np.log1p(counts)
        score = x @ (rng.normal(0, 4, 3) @ patterns)
        active = score + rng.logistic(0, 0.5, NUM_ROWS) > np.median(score)
        assays.append((x, np.where(active, "active", "inactive")))
    return assays


def from_fsmol(split: str, num_assays: int, data: Path | None) -> list[Assay]:
    """The first assays of FS-Mol of enough molecules, at most NUM_ROWS of each."""
    found = load_assays(split, root=data)
    chosen = [index for index, rows in enumerate(found.rows) if len(rows) >= NUM_ROWS][:num_assays]
    rows = [found.rows[index][:NUM_ROWS] for index in chosen]
    labels = [np.where(found.labels[index][:NUM_ROWS] == 1, "active", "inactive") for index in chosen]
    return [(found.fingerprints(of_assay).numpy(), y) for of_assay, y in zip(rows, labels, strict=True)]


def logistic_regression(tasks: list[Assay]) -> float:
    """Mean accuracy of a logistic regression on the known molecules of each assay, as in docs/evidence-molecules.md."""
    fitted = [LogisticRegression(C=0.1).fit(x[:NUM_KNOWN], y[:NUM_KNOWN]) for x, y in tasks]
    scores = [model.score(x[NUM_KNOWN:], y[NUM_KNOWN:]) for model, (x, y) in zip(fitted, tasks, strict=True)]
    return float(np.mean(scores))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with fsmol_train_valid.npz")
    parser.add_argument("--num-assays", type=int, default=200, help="assays to learn from")
    parser.add_argument("--steps", type=int, help="meta-steps of training (default: the library's)")
    options = parser.parse_args(arguments)
    try:
        train, test = from_fsmol("train", options.num_assays, options.data), from_fsmol("valid", 30, options.data)
        print("FS-Mol (CC BY-SA 3.0)")
    except FileNotFoundError:
        train, test = made_up(options.num_assays, seed=1), made_up(30, seed=2)
        print("Made-up assays")
    # A logistic regression needs both classes.
    test = [(x, y) for x, y in test if len(set(y[:NUM_KNOWN])) == 2]

    splits = SplitSettings(num_support=NUM_KNOWN)
    learner = MetaLearner(seed=0).fit(train, 0.2, splits=splits, num_steps=options.steps)
    right, surest = [], []
    for x, y in test:
        prediction = learner.adapt(x[:NUM_KNOWN], y[:NUM_KNOWN]).predict(x[NUM_KNOWN:])
        hits = torch.as_tensor(prediction.labels == y[NUM_KNOWN:]).double()
        order = torch.as_tensor(prediction.total_uncertainty).argsort()
        right.append(hits.mean())
        surest.append(hits[order[: len(hits) // 4]].mean())
    print(f"{len(train)} assays to learn from, {len(test)} new ones with {NUM_KNOWN} known molecules each")
    print(f"accuracy: ibaml {np.mean(right):.3f}, on the surest quarter {np.mean(surest):.3f}")
    print(f"          logistic regression per assay {logistic_regression(test):.3f}")


if __name__ == "__main__":
    main()
