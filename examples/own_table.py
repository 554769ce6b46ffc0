"""From one long table to predictions with intervals: dose-response curves of patients, six measurements each.

The table has a row per measurement and a column that says whose it is. From eighty patients the learner finds out what
such curves look like and how they differ; a new patient then needs a few measurements. A ridge regression per patient,
linear in the logarithm of the dose, knows only those few. The patients are simulated here: replace `make_patients` by
`pandas.read_csv`. Seconds on one CPU thread.
"""

import argparse
import tempfile
from statistics import NormalDist

import numpy as np
import pandas as pd

from ibaml import MetaLearner

NUM_KNOWN = 6
NUM_PATIENTS = {"train": 80, "held out": 30, "test": 40}
FEATURES = ["dose", "fasting"]


def make_patients(num_patients: int, rng: np.random.Generator) -> pd.DataFrame:
    """Responses that rise with the dose and level off, each patient in another way."""
    tables = []
    for number in range(num_patients):
        num_rows = rng.integers(16, 30)
        dose, fasting = rng.uniform(0, 100, num_rows), rng.integers(0, 2, num_rows)
        baseline, top, half_dose = rng.normal(20, 3), rng.normal(60, 12), rng.uniform(8, 40)
        effect = top * dose / (dose + half_dose) * (1 - rng.uniform(0.1, 0.4) * (1 - fasting))
        response = baseline + effect + rng.normal(0, 3, num_rows)
        patient = {"patient": f"p{number}", "dose": dose, "fasting": fasting, "response": response}
        tables.append(pd.DataFrame(patient))
    return pd.concat(tables, ignore_index=True)


def ridge(known: pd.DataFrame, asked: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the response by ridge regression on one patient's measurements."""
    design, queries = (np.c_[np.ones(len(t)), np.log1p(t["dose"]) - 3.5, t["fasting"] - 0.5] for t in (known, asked))
    weights = np.linalg.solve(design.T @ design + 0.1 * np.eye(3), design.T @ known["response"])
    deviation = np.sqrt(((known["response"] - design @ weights) ** 2).sum() / (len(known) - 3))
    return queries @ weights, np.full(len(asked), deviation)


def compare(learner: MetaLearner, patients: pd.DataFrame, level: float = 0.9) -> pd.DataFrame:
    """Adapts to each patient's first measurements and judges the predictions of the others."""
    rows = []
    for _, patient in patients.groupby("patient"):
        known, asked = patient[:NUM_KNOWN], patient[NUM_KNOWN:]
        prediction = learner.adapt(known[FEATURES], known["response"]).predict(asked[FEATURES])
        mean, deviation = ridge(known, asked)
        half_width = NormalDist().inv_cdf((1 + level) / 2) * deviation
        for method, centre, lower, upper in (
            ("ibaml", prediction.mean, *prediction.interval(level)),
            ("ridge per patient", mean, mean - half_width, mean + half_width),
        ):
            y = asked["response"].to_numpy()
            inside = (lower <= y) & (y <= upper)
            rows.append(pd.DataFrame({"method": method, "squared": (centre - y) ** 2, "inside": inside}))
            rows[-1]["width"] = upper - lower
    table = pd.concat(rows).groupby("method").mean()
    return pd.DataFrame({"rmse": table["squared"] ** 0.5, "coverage_90": table["inside"], "width": table["width"]})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", help="where to save the model (default: a temporary folder)")
    options = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    train, held_out, test = (make_patients(number, rng) for number in NUM_PATIENTS.values())
    print(
        f"The table of {len(train)} measurements begins like this:\n{train.head(3).round(1).to_string(index=False)}\n"
    )

    learner = MetaLearner(likelihood="gaussian", seed=0)
    learner.fit(train, 0.2, task="patient", target="response")
    print(f"Chosen on patients that were left out: {learner.choice.name}\n")
    learner.calibrate(held_out)  # patients that training has not seen; one factor for all standard deviations
    with tempfile.TemporaryDirectory() as temporary:
        learner.save(folder := options.folder or temporary)
        learner = MetaLearner.load(folder)

    new = test[test["patient"] == "p0"]
    known, asked = new[:NUM_KNOWN], new[NUM_KNOWN : NUM_KNOWN + 4]
    prediction = learner.adapt(known[FEATURES], known["response"]).predict(asked[FEATURES])
    lower, upper = prediction.interval(0.9)
    shown = asked[[*FEATURES, "response"]].assign(predicted=prediction.mean, lower_90=lower, upper_90=upper)
    print(f"A new patient, after {NUM_KNOWN} measurements:\n{shown.round(1).to_string(index=False)}\n")

    print(f"All {NUM_PATIENTS['test']} new patients (coverage should be 0.90, a narrow width is better):")
    print(compare(learner, test).round(2).to_string())
    print("The noise alone has a standard deviation of 3, which makes 90% intervals at least 9.9 wide.")


if __name__ == "__main__":
    main()
