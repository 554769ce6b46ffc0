"""One task and what was predicted for it: images with their classes, or a curve with its band."""

from collections.abc import Sequence

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ibaml.metrics import central_interval
from ibaml.plots.style import BLUE, DPI, GREY, SKY, STYLE, VERMILION, WIDTH, new_figure, shorten
from ibaml.types import Episode, Tensor


def example_task(
    episode: Episode,
    probs: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    title: str = "One task",
    max_classes: int = 8,
    max_support: int = 5,
    max_query: int = 6,
) -> Figure:
    """One image-classification task: support images by class, query images with their predictions.

    Each row is a class. A query image carries a tick or a cross, the confidence, and the predicted class.

    Examples:
        >>> from ibaml.types import Batch
        >>> batch = Batch(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]))
        >>> figure = example_task(Episode(batch, batch), torch.tensor([[0.9, 0.1], [0.8, 0.2]]))

    Args:
        episode: A single task; ``x`` of shape ``[num_examples, height, width]`` or ``[num_examples, channels, height,
            width]`` with 1 or 3 channels, on any scale; ``y`` class indices of shape ``[num_examples]``.
        probs: Predictive probabilities at the query images, shape ``[num_query, num_classes]``.
        class_names: A name for each class; by default the numbers from 0.
        title: Title of the figure.
        max_classes: Show at most so many classes, the first.
        max_support: Show at most so many support images of a class.
        max_query: Show at most so many query images of a class.

    Returns:
        The figure. What was left out for space is said below the title.

    Raises:
        ValueError: If a shape does not fit or the targets are no class indices.
    """
    support_x, query_x = _images("episode.support.x", episode.support.x), _images("episode.query.x", episode.query.x)
    support_y, query_y = episode.support.y.detach().cpu(), episode.query.y.detach().cpu()
    for name, y, x in (("support", support_y, support_x), ("query", query_y, query_x)):
        if y.is_floating_point():
            raise ValueError(
                f"episode.{name}.y has dtype {y.dtype}; expected class indices: for regression use example_regression."
            )
        if y.shape != (len(x),):
            raise ValueError(
                f"episode.{name}.y has shape {list(y.shape)}; expected [{len(x)}], a label for each image of one task."
            )
    if probs.ndim != 2 or len(probs) != len(query_y):
        raise ValueError(f"probs has shape {list(probs.shape)}; expected [{len(query_y)}, num_classes].")
    num_classes = probs.shape[1]
    highest = int(torch.cat([support_y, query_y]).max())
    if highest >= num_classes:
        raise ValueError(f"episode has label {highest}; expected labels below {num_classes}, the last axis of probs.")
    names = [str(index) for index in range(num_classes)] if class_names is None else [str(name) for name in class_names]
    if len(names) != num_classes:
        raise ValueError(f"class_names has {len(names)} names; expected {num_classes}, the last axis of probs.")

    low = min(float(support_x.min()), float(query_x.min()))
    span = max(float(support_x.max()), float(query_x.max())) - low or 1.0
    confidence, prediction = probs.detach().cpu().to(torch.float64).max(-1)
    classes = range(min(num_classes, max_classes))
    support_of: dict[int, list[int]] = {c: (support_y == c).nonzero().flatten().tolist() for c in classes}
    query_of: dict[int, list[int]] = {c: (query_y == c).nonzero().flatten().tolist() for c in classes}
    num_support = max(1, min(max_support, max(len(indices) for indices in support_of.values())))
    num_query = max(1, min(max_query, max(len(indices) for indices in query_of.values())))

    correct = int((prediction == query_y).sum())
    summary = f"{correct} of {len(query_y)} query images right"
    shown = sum(min(len(indices), num_query) for indices in query_of.values())
    if shown < len(query_y):
        summary += f"; {shown} shown"
    if len(classes) < num_classes:
        summary += f"; {len(classes)} of {num_classes} classes shown"

    with mpl.rc_context(STYLE):
        # Row labels, support images, a gap, query images; in units of one query image.
        label_width = 1.2 if max(len(name) for name in names) > 4 else 0.55
        widths = [label_width, *[0.8] * num_support, 0.25, *[1.0] * num_query]
        spacing = 0.1
        total = sum(widths) * (1 + spacing * (len(widths) - 1) / len(widths))
        width = min(max(1.1 * total, 5.5), WIDTH)
        unit = 0.98 * width / total
        above, below, between = 1.05, 0.85, 0.5
        height = above + len(classes) * unit + (len(classes) - 1) * between + below
        figure = Figure(figsize=(width, height), dpi=DPI)
        grid = figure.add_gridspec(
            len(classes),
            len(widths),
            width_ratios=widths,
            left=0.01,
            right=0.99,
            bottom=below / height,
            top=1 - above / height,
            wspace=spacing,
            hspace=between / unit,
        )
        figure.text(0.5, 1 - 0.22 / height, title, ha="center", va="center", size=14, weight="bold")
        figure.text(0.5, 1 - 0.5 / height, summary, ha="center", va="center", color=GREY)
        legend = "✓ right or ✗ wrong, with the confidence and the predicted class"
        figure.text(0.5, 0.2 / height, legend, ha="center", va="center", size=10, color=GREY)
        for column, heading in ((1, "Support"), (2 + num_support, "Query")):
            left = grid[0, column].get_position(figure).x0
            figure.text(left, 1 - (above - 0.1) / height, heading, size=12, weight="bold")
        # About 0.095 inches a letter.
        name_length, caption_length = int(label_width * unit / 0.095), max(3, int(unit / 0.095))
        for row, label in enumerate(classes):
            axes = figure.add_subplot(grid[row, 0])
            axes.axis("off")
            axes.text(
                0.95,
                0.5,
                shorten(names[label], name_length),
                ha="right",
                va="center",
                transform=axes.transAxes,
                size=10,
            )
            for column, index in enumerate(support_of[label][:num_support]):
                axes = figure.add_subplot(grid[row, 1 + column])
                _draw_image(axes, (support_x[index] - low) / span, GREY, 0.8)
            for column, index in enumerate(query_of[label][:num_query]):
                axes = figure.add_subplot(grid[row, 2 + num_support + column])
                right = int(prediction[index]) == label
                color = BLUE if right else VERMILION
                _draw_image(axes, (query_x[index] - low) / span, color, 2.5)
                caption = f"{'✓' if right else '✗'} {float(confidence[index]):.0%}\n"
                caption += shorten(names[int(prediction[index])], caption_length)
                axes.set_xlabel(caption, color=color, size=10, weight="normal" if right else "bold", labelpad=3)
    return figure


def example_regression(
    episode: Episode,
    mean: Tensor,
    variance: Tensor,
    *,
    title: str = "One task",
    x_label: str = "x",
    y_label: str = "y",
) -> Figure:
    """One regression task of one input and one output: support and query points, predictive mean and 90% band.

    The band is ``mean +- 1.645 sqrt(variance)``, that of a Gaussian prediction.

    Examples:
        >>> from ibaml.types import Batch
        >>> batch = Batch(torch.linspace(-1, 1, 5)[:, None], torch.zeros(5, 1))
        >>> figure = example_regression(Episode(batch, batch), torch.zeros(5, 1), torch.ones(5, 1))

    Args:
        episode: A single task; ``x`` of shape ``[num_examples]`` or ``[num_examples, 1]``, ``y`` the same.
        mean: Predictive mean at the query inputs, as many values as query examples.
        variance: Total predictive variance there, in the target's unit squared.
        title: Title of the figure.
        x_label: Label of the input axis, with its unit.
        y_label: Label of the target axis, with its unit.

    Returns:
        The figure.

    Raises:
        ValueError: If the inputs or targets are not one-dimensional, or the sizes differ.
    """
    arrays = {
        "episode.support.x": _column(episode.support.x),
        "episode.support.y": _column(episode.support.y),
        "episode.query.x": _column(episode.query.x),
        "episode.query.y": _column(episode.query.y),
        "mean": _column(mean),
        "variance": _column(variance),
    }
    sizes = {"support": episode.support.x.shape[0], "query": episode.query.x.shape[0]}
    for name, array in arrays.items():
        num_examples = sizes["support" if ".support." in name else "query"]
        if array is None or len(array) != num_examples:
            given = {"mean": mean, "variance": variance}.get(name)
            if given is None:
                given = getattr(getattr(episode, name.split(".")[1]), name[-1])
            raise ValueError(
                f"{name} has shape {list(given.shape)}; expected [{num_examples}] or [{num_examples}, 1]: "
                "one task, one input, one output."
            )
    support_x, support_y, query_x, query_y, center, spread = (
        torch.empty(0) if array is None else array for array in arrays.values()
    )
    order = query_x.argsort()
    lower, upper = central_interval(center[order], spread[order], 0.9)
    with mpl.rc_context(STYLE):
        figure = new_figure(8.0, 4.8)
        axes = figure.add_subplot()
        axes.fill_between(
            query_x[order].numpy(), lower.numpy(), upper.numpy(), color=SKY, alpha=0.35, lw=0, label="90% interval"
        )
        axes.plot(query_x[order].numpy(), center[order].numpy(), color=BLUE, lw=2, label="predictive mean")
        axes.plot(
            query_x.numpy(), query_y.numpy(), "o", ms=4, mfc="white", mec=GREY, mew=1, label="query targets", zorder=3
        )
        axes.plot(
            support_x.numpy(), support_y.numpy(), "X", ms=10, mfc=VERMILION, mec="white", label="support", zorder=4
        )
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(x=0.02, y=0.08)
        figure.suptitle(title)
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def _images(name: str, x: Tensor) -> Tensor:
    """Returns images as ``[num_examples, height, width]`` or ``[num_examples, height, width, 3]``, float64."""
    shape = list(x.shape)
    x = x.detach().cpu().to(torch.float64)
    if x.ndim == 4 and x.shape[1] in (1, 3):
        x = x[:, 0] if x.shape[1] == 1 else x.permute(0, 2, 3, 1)
    elif x.ndim != 3:
        raise ValueError(
            f"{name} has shape {shape}; expected [num_examples, height, width] or "
            "[num_examples, 1 or 3, height, width], the images of one task."
        )
    if x.numel() == 0:
        raise ValueError(f"{name} has shape {shape}; expected at least one image.")
    return x


def _column(values: Tensor) -> Tensor | None:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    return values.detach().cpu().to(torch.float64) if values.ndim == 1 else None


def _draw_image(axes: Axes, image: Tensor, color: str, width: float) -> None:
    axes.imshow(image.numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=width)
