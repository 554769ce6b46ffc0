import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from ibaml import plots
from ibaml.plots.style import new_figure, shorten


class TestSave:
    def test_writes_a_png_at_150_dots_per_inch(self, tmp_path: Path) -> None:
        path = plots.save(Figure(figsize=(2, 1)), tmp_path / "new" / "figure.png")
        assert imread(path).shape[:2] == (150, 300)
        assert [file.name for file in path.parent.iterdir()] == ["figure.png"]

    def test_a_failure_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "figure.png"
        path.write_bytes(b"old")

        def half_written(_: Figure, target: Path, **__: object) -> None:
            target.write_bytes(b"part")
            raise OSError("disk full")

        monkeypatch.setattr(Figure, "savefig", half_written)
        with pytest.raises(OSError, match="disk full"):
            plots.save(Figure(), path)
        assert path.read_bytes() == b"old"
        assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]

    def test_other_formats_are_refused(self) -> None:
        with pytest.raises(ValueError, match=re.escape("path is 'figure.pdf'; expected a name that ends in .png")):
            plots.save(Figure(), "figure.pdf")


def test_a_new_figure_has_its_size_and_makes_room() -> None:
    figure = new_figure(6.0, 2.5)
    assert figure.get_size_inches().tolist() == [6.0, 2.5]
    axes = figure.add_subplot()
    axes.set_ylabel("two\nlines")
    figure.draw_without_rendering()
    # The label moved inside, as far from the edge as the margin in inches.
    left = axes.yaxis.label.get_window_extent().x0 / figure.dpi
    assert left == pytest.approx(0.08, abs=0.02)


@pytest.mark.parametrize(
    ("text", "length", "expected"), [("cube", 4, "cube"), ("cubes", 4, "cub…"), ("cube", 1, "…"), ("", 3, "")]
)
def test_a_name_is_cut_to_its_room(text: str, length: int, expected: str) -> None:
    assert shorten(text, length) == expected
