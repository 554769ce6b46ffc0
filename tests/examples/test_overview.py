"""What examples/README.md promises of all of them."""

from pathlib import Path

FOLDER = Path(__file__).parents[2] / "examples"


def test_every_example_is_short_and_listed():
    overview = (FOLDER / "README.md").read_text()
    scripts = sorted(FOLDER.glob("*.py"))
    assert len(scripts) == 11
    for script in scripts:
        most = 200 if script.name == "ibaml_from_scratch.py" else 100
        assert len(script.read_text().splitlines()) <= most, script.name
        assert f"[{script.name}]({script.name})" in overview
        assert (Path(__file__).parents[2] / "README.md").read_text().count("](examples/README.md)") == 1
