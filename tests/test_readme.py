"""The README's Python blocks run as written, one after the other, on fewer steps and tasks than a reader would use."""

import dataclasses
import re
from functools import partialmethod
from pathlib import Path

import numpy as np
import torch

import ibaml
from ibaml import recipes

README = Path(__file__).parents[1] / "README.md"


def test_readme_blocks_run_as_written(tmp_path, monkeypatch, glyph_cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("IBAML_DATA", str(glyph_cache))
    full = recipes.get_recipe("glyphs_5way_5shot")
    short = dataclasses.replace(full.trainer, num_steps=1, num_validation_tasks=2)
    monkeypatch.setattr(recipes, "get_recipe", lambda name: dataclasses.replace(full, trainer=short))
    monkeypatch.setattr(ibaml.MetaLearner, "evaluate", partialmethod(ibaml.MetaLearner.evaluate, num_tasks=2))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    generator = torch.Generator().manual_seed(0)
    names = {
        "x_support": torch.rand(25, 1, 28, 28, generator=generator),
        "y_support": torch.arange(5).repeat_interleave(5),
        "x_query": torch.rand(10, 1, 28, 28, generator=generator),
    }
    for block in blocks[1:]:
        exec(block, names)
    assert names["report"].keys() >= {"accuracy", "nll", "ece"}
    assert names["prediction"].probs.shape == (10, 5)
    rng = np.random.default_rng(0)
    tasks = [(x := rng.normal(size=(size, 2)), np.where(x[:, 0] > 0, "a", "b")) for size in (12, 9, 15)]
    (x, y), *_ = tasks
    data = {"train_tasks": tasks, "x_support": x[:5], "y_support": y[:5], "x_query": x[5:]}
    data |= {"x_more": x[5:6], "y_more": y[5:6]}
    fit = ibaml.MetaLearner.fit
    monkeypatch.setattr(ibaml.MetaLearner, "fit", lambda self, *a, **k: fit(self, *a, **{**k, "num_steps": 2}))
    exec(blocks[0], data)
    assert data["prediction"].probs.shape == (7, 2)
    # The comment beside the hypergradient in the README.
    torch.testing.assert_close(names["gradient"], torch.tensor(-0.0480), rtol=0, atol=1e-4)
