"""A recipe of images from end to end."""

import json
from pathlib import Path

GLYPHS = (
    "--trainer.num-validation-tasks",
    "2",
    "--trainer.tasks-per-step",
    "1",
    "--data.num-shots",
    "1",
    "--data.num-queries",
    "1",
    "--data.num-test-queries",
    "2",
    "--network.arguments.channels",
    "4",
)


def test_glyphs_from_end_to_end(ibaml, glyph_cache, monkeypatch):
    monkeypatch.setenv("IBAML_DATA", str(glyph_cache))
    for name in ("ibaml", "maml"):
        code, _, errors = ibaml(
            "train",
            f"glyphs_5way_5shot_{name}",
            "--run-folder",
            name,
            "--steps",
            2,
            "--device",
            "cpu",
            *GLYPHS,
        )
        assert code == 0, errors
        code, output, errors = ibaml("evaluate", name, "--tasks", 3)
        assert code == 0, errors
        assert "accuracy" in output and "ece_pooled" in output
        pictures = {path.name for path in Path(name, "evaluation").glob("*.png")}
        assert pictures == {"reliability.png", "selective.png", "example_task.png"}
    code, output, _ = ibaml("compare", "ibaml", "maml")
    assert code == 0
    assert "maml - ibaml" in output
    report = json.loads(Path("ibaml/evaluation/report.json").read_text())
    assert report["tasks"]["data"]["type"] == "Glyphs" and report["tasks"]["num_tasks"] == 3
