import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ibaml import plots
from ibaml.types import Batch, Episode, Tensor


class TestExampleTask:
    def test_captions_tell_right_from_wrong_by_mark(
        self, image_task: Callable[..., Episode], texts: Callable[[Figure], list[str]]
    ) -> None:
        episode = image_task(num_classes=2, num_support=1, num_query=1)
        probs = torch.tensor([[0.9, 0.1], [0.7, 0.3]])
        found = texts(plots.example_task(episode, probs, class_names=["cat", "dog"], title="Pets"))
        assert {"✓ 90%\ncat", "✗ 70%\ncat", "1 of 2 query images right", "Pets", "cat", "dog"} <= set(found)

    def test_what_is_left_out_is_said(
        self, image_task: Callable[..., Episode], texts: Callable[[Figure], list[str]]
    ) -> None:
        episode = image_task(num_classes=4, num_support=6, num_query=9)
        figure = plots.example_task(episode, torch.eye(4).repeat(9, 1), max_classes=3, max_support=2, max_query=5)
        assert "36 of 36 query images right; 15 shown; 3 of 4 classes shown" in texts(figure)
        images = [axes for axes in figure.axes if axes.images]
        assert len(images) == 3 * (2 + 5)

    def test_images_share_one_scale(self) -> None:
        x = torch.tensor([0.0, 3.0, -1.0]).view(3, 1, 1).expand(3, 4, 4)
        episode = Episode(Batch(x[:1], torch.tensor([0])), Batch(x[1:], torch.tensor([0, 0])))
        figure = plots.example_task(episode, torch.tensor([[0.6, 0.4], [0.6, 0.4]]))
        values = [float(np.asarray(axes.images[0].get_array()).max()) for axes in figure.axes if axes.images]
        assert values == [0.25, 1.0, 0.0]

    def test_a_constant_image_is_drawn(self) -> None:
        batch = Batch(torch.ones(2, 4, 4), torch.tensor([0, 1]))
        assert plots.example_task(Episode(batch, batch), torch.eye(2)).axes

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda e, p: plots.example_task(Episode(e.support, Batch(e.query.x, e.query.y.float())), p),
                "episode.query.y has dtype torch.float32; expected class indices: for regression use",
            ),
            (
                lambda e, p: plots.example_task(Episode(Batch(e.support.x, e.support.y[:2]), e.query), p),
                "episode.support.y has shape [2]; expected [6], a label for each image",
            ),
            (
                lambda e, p: plots.example_task(Episode(Batch(e.support.x[None], e.support.y), e.query), p),
                "episode.support.x has shape [1, 6, 1, 8, 8]; expected [num_examples, height, width] or",
            ),
            (
                lambda e, p: plots.example_task(Episode(Batch(e.support.x[:0], e.support.y[:0]), e.query), p),
                "episode.support.x has shape [0, 1, 8, 8]; expected at least one image",
            ),
            (lambda e, p: plots.example_task(e, p[:3]), "probs has shape [3, 3]; expected [12, num_classes]"),
            (lambda e, p: plots.example_task(e, p[:, :2]), "episode has label 2; expected labels below 2"),
            (
                lambda e, p: plots.example_task(e, p, class_names=["a"]),
                "class_names has 1 names; expected 3, the last axis of probs",
            ),
        ],
    )
    def test_bad_input_is_refused(
        self, call: Callable[[Episode, Tensor], Figure], message: str, image_task: Callable[..., Episode]
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            call(image_task(), torch.full((12, 3), 1 / 3))


class TestExampleRegression:
    def test_the_band_is_the_central_interval_in_the_order_of_x(self) -> None:
        x = torch.tensor([[2.0], [0.0], [1.0]])
        query, support = Batch(x, x**2), Batch(torch.tensor([0.5]), torch.tensor([0.25]))
        figure = plots.example_regression(Episode(support, query), x**2, torch.full((3,), 4.0), x_label="time (s)")
        (axes,) = figure.axes
        mean_line, targets, given = axes.lines
        np.testing.assert_allclose(mean_line.get_xydata(), [[0, 0], [1, 1], [2, 4]])
        np.testing.assert_allclose(targets.get_xydata(), [[2, 4], [0, 0], [1, 1]])
        np.testing.assert_allclose(given.get_xydata(), [[0.5, 0.25]])
        vertices = axes.collections[0].get_paths()[0].vertices
        assert np.asarray(vertices)[:, 1].max() == pytest.approx(4 + 2 * 1.6448536269514722)
        assert axes.get_xlabel() == "time (s)"

    def test_bad_input_is_refused(self) -> None:
        good = Batch(torch.zeros(4, 1), torch.zeros(4, 1))
        plane = Batch(torch.zeros(4, 2), torch.zeros(4, 1))
        ones = torch.ones(4)
        with pytest.raises(ValueError, match=re.escape("episode.support.x has shape [4, 2]; expected [4] or [4, 1]")):
            plots.example_regression(Episode(plane, good), ones, ones)
        with pytest.raises(ValueError, match=re.escape("variance has shape [3]; expected [4] or [4, 1]")):
            plots.example_regression(Episode(good, good), ones, ones[:3])
