"""Uses an installed ibaml as its users do: learns, saves, loads and predicts, in Python and by the command.

``python -I use.py VERSION FOLDER_OF_THE_COMMAND``, run in an empty folder by ``check.py``.
"""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

import ibaml
from ibaml import MetaLearner


def make_table(num_lines: int) -> pd.DataFrame:
    """Returns lines with slopes around 2, 12 points each."""
    rng = np.random.default_rng(0)
    slope, x = rng.normal(2, 0.5, num_lines).repeat(12), rng.normal(size=12 * num_lines)
    line = np.char.add("line ", np.arange(num_lines).repeat(12).astype(str))
    return pd.DataFrame({"line": line, "x": x, "y": slope * x + rng.normal(0, 0.1, len(x))})


def run(command: Path, *arguments: str) -> str:
    """Returns what the command prints."""
    done = subprocess.run([str(command), *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command.name} {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def main() -> None:
    """Learns, saves, loads and predicts."""
    wanted, folder = sys.argv[1], Path(sys.argv[2])
    assert version("ibaml") == ibaml.__version__ == wanted, (version("ibaml"), wanted)
    home = Path(ibaml.__file__)
    assert home.is_relative_to(folder.parent), f"ibaml comes from {home}, not from the new environment"

    table = make_table(21)
    learner = MetaLearner(likelihood="gaussian").fit(table[:-12], task="line", target="y")
    known, asked = table[-12:-9], table[-9:]
    predicted = learner.adapt(known, known["y"]).predict(asked)
    assert np.abs(predicted.mean - asked["y"].to_numpy()).mean() < 0.3, predicted
    again = MetaLearner.load(learner.save("model")).adapt(known, known["y"]).predict(asked)
    assert np.array_equal(again.mean, predicted.mean)

    known.to_csv("known.csv", index=False)
    asked.drop(columns="y").to_csv("asked.csv", index=False)
    command = folder / "ibaml"
    assert "glyphs_5way_5shot" in run(command, "recipes")
    assert f"ibaml {wanted}" in run(command, "doctor")
    run(command, "predict", "model", "--support", "known.csv", "--query", "asked.csv", "--out", "out.csv")
    assert np.allclose(pd.read_csv("out.csv")["predicted"], predicted.mean)
    print(f"ibaml {wanted} from {home.parent}: fit, save, load, predict, recipes and doctor work")


if __name__ == "__main__":
    main()
