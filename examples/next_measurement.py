"""Which plot to measure next: a new field, one plot at a time, chosen by the posterior beside chosen at random.

Fields differ in how much nitrogen and water they need. From sixty of them the learner knows what fields are like; in a
new one every measurement tells something about the others, and `posterior.acquisition` says which tells most. The
fields are simulated: replace `make_field` by your own table.
"""

import argparse

import numpy as np

from ibaml import MetaLearner

NUM_MEASUREMENTS = 6


def make_field(rng: np.random.Generator):
    """A field: yields in tonnes a hectare of plots `[nitrogen in kg/ha, water in mm]`."""
    top, nitrogen, water = rng.normal(8, 1), rng.normal(120, 25), rng.normal(300, 40)

    def yields(plots: np.ndarray) -> np.ndarray:
        loss = ((plots[:, 0] - nitrogen) / 70) ** 2 + ((plots[:, 1] - water) / 150) ** 2
        return top - loss + rng.normal(0, 0.2, len(plots))

    return yields


def make_plots(count: int, rng: np.random.Generator) -> np.ndarray:
    return np.column_stack([rng.uniform(0, 240, count), rng.uniform(100, 500, count)])


def errors(learner: MetaLearner, field, candidates: np.ndarray, asked: np.ndarray, rng=None) -> list[float]:
    """Root mean squared error on the asked plots after each measurement: chosen at random if there is a generator."""
    truth, found, measured = field(asked), [], []
    posterior = learner.adapt(candidates[:0], np.zeros(0))  # nothing is known: the prior
    for _ in range(NUM_MEASUREMENTS):
        left = np.setdiff1d(np.arange(len(candidates)), measured)
        if rng is None:
            chosen = left[posterior.acquisition(candidates[left], 1, of=asked).positions[0]]
        else:
            chosen = rng.choice(left)
        measured.append(int(chosen))
        row = candidates[[chosen]]
        posterior = posterior.update(row, field(row))
        found.append(float(np.sqrt(np.mean((posterior.predict(asked).mean - truth) ** 2))))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-fields", type=int, default=30, help="new fields to try both on")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    train = []
    for _ in range(60):
        field, plots = make_field(rng), make_plots(30, rng)
        train.append((plots, field(plots)))
    learner = MetaLearner(likelihood="gaussian", seed=0).fit(train)
    print(f"Learned from 60 fields: {learner.choice.name}")

    chosen, at_random = [], []
    for _ in range(options.num_fields):
        field, candidates, asked = make_field(rng), make_plots(40, rng), make_plots(60, rng)
        chosen.append(errors(learner, field, candidates, asked))
        at_random.append(errors(learner, field, candidates, asked, rng))
    print(f"Root mean squared error in t/ha on the other plots of {options.num_fields} new fields (noise: 0.2)")
    print(f"{'measured':>10} {'chosen':>8} {'random':>8}")
    for count, pair in enumerate(zip(np.mean(chosen, 0), np.mean(at_random, 0), strict=True), 1):
        print(f"{count:>10} {pair[0]:8.2f} {pair[1]:8.2f}")


if __name__ == "__main__":
    main()
