"""Strokes become pictures like those of training; the shipped model tells drawings apart, and what is none of them."""

import base64
import io

import numpy as np
import pytest
from benchmarks.pen import FIGURES, sketch
from PIL import Image

from ibaml.data import load_glyphs
from ibaml.playground.draw import answer, judge
from ibaml.playground.strokes import MOST_POINTS, draw, read_strokes

LINE = [[[10.0, 40.0], [110.0, 40.0]]]


def test_a_picture_does_not_depend_on_place_and_size():
    figure = sketch("house", np.random.default_rng(0))
    moved = [[(3 * x + 500, 3 * y - 70) for x, y in stroke] for stroke in figure]
    assert np.abs(draw(figure).astype(int) - draw(moved)).max() <= 60  # rounding of places to an eighth of a pixel


@pytest.mark.parametrize("strokes", [LINE, [[[y, x] for x, y in LINE[0]]], sketch("star", np.random.default_rng(1))])
def test_ink_is_centred_and_fills_the_share_of_training(strokes):
    picture = draw(strokes)[0]
    assert picture.shape == (28, 28) and picture.dtype == np.uint8
    places = np.argwhere(picture > 100)
    low, high = places.min(0), places.max(0)
    assert (high - low + 1).max() in (18, 19, 20)
    np.testing.assert_allclose((low + high) / 2, 13.5, atol=1)


def test_the_line_is_as_wide_whatever_the_scale():
    for size in (1, 1000):
        ink = draw([[(0, 0), (size, 0)]])[0].astype(float) / 255
        np.testing.assert_allclose(ink.sum(0)[10:18], 2.3, atol=0.4)


def test_a_dot_is_a_dot():
    ink = draw([[(5, 5)]])[0]
    assert 3 < (ink / 255).sum() < 8
    np.testing.assert_array_equal(ink, draw([[(99, 1)]])[0])


def test_line_width_is_that_of_the_characters():
    """Ink in the skeleton's surroundings: the share of inked pixels of a drawn circle is near that of O and 0."""
    glyphs = load_glyphs("train")
    numbers = [number for number, name in enumerate(glyphs.class_names) if name.endswith("LATIN CAPITAL LETTER O")]
    assert len(numbers) == 1
    first, last = glyphs.class_start[numbers[0] : numbers[0] + 2].tolist()
    printed = glyphs.images[first:last].double().mean() / 255
    drawn = np.mean([draw(sketch("circle", np.random.default_rng(seed))).mean() for seed in range(5)]) / 255
    np.testing.assert_allclose(drawn, printed, rtol=0.25)


def test_drawings_are_told_apart():
    """Accuracy on 20 tasks of five figures with three examples each, by a model that has never seen a drawing."""
    rng = np.random.default_rng(0)
    correct, alarms, noticed = [], [], []
    for _ in range(20):
        chosen = rng.choice(list(FIGURES), 6, replace=False).tolist()
        labels = [name for name in chosen[:5] for _ in range(3)]
        examples = np.stack([draw(sketch(name, rng)) for name in labels])
        for name in chosen[:5]:
            verdict = judge(examples, labels, draw(sketch(name, rng)))
            correct.append(verdict.labels[int(np.argmax(verdict.probabilities))] == name)
            alarms.append(verdict.says == "none of these")
        noticed.append(judge(examples, labels, draw(sketch(chosen[5], rng))).says == "none of these")
    assert np.mean(correct) >= 0.94
    assert np.mean(alarms) <= 0.12
    assert np.mean(noticed) >= 0.5


def example(label, figure, seed):
    return {"label": label, "strokes": sketch(figure, np.random.default_rng(seed))}


EXAMPLES = [example("h", "house", 1), example("s", "star", 2), example("h", "house", 3), example("s", "star", 4)]


def test_the_answer_has_the_verdict_and_what_each_example_changed():
    query = sketch("house", np.random.default_rng(7))
    told = answer({"examples": EXAMPLES, "query": query, "history": True})
    verdict = told["verdict"]
    assert verdict["says"] == "h" and verdict["labels"] == ["h", "s"]
    assert verdict["probabilities"][0] > 0.9
    np.testing.assert_allclose(sum(verdict["probabilities"]), 1, rtol=1e-6)
    assert 0 <= verdict["epistemic"] <= verdict["total"] <= np.log(2)
    assert [(row["num_examples"], row["added"]) for row in told["history"]] == [(2, "s"), (3, "h"), (4, "s")]
    assert told["history"][-1]["probabilities"] == verdict["probabilities"]
    seen = Image.open(io.BytesIO(base64.b64decode(told["seen"].removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(seen), draw(query)[0])


def test_none_of_these_becomes_a_class_once_it_is_taught():
    query = sketch("spiral", np.random.default_rng(7))
    assert answer({"examples": EXAMPLES, "query": query})["verdict"]["says"] == "none of these"
    taught = [*EXAMPLES, *(example("z", "spiral", seed) for seed in (3, 4, 5))]
    assert answer({"examples": taught, "query": query})["verdict"]["says"] == "z"


def test_too_little_to_say_anything():
    nothing = {"seen": "", "verdict": None, "history": []}
    assert answer({"examples": EXAMPLES, "query": []}) == nothing
    assert answer({"examples": EXAMPLES[:1], "query": LINE})["verdict"]["says"] == "too few"
    assert answer({"examples": [], "query": LINE, "history": True})["history"] == []


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([example("h", "house", seed) for seed in range(6)], "class 'h' has 6 drawings; expected at most 5"),
        ([example(str(label), "house", 0) for label in range(11)], "there are 11 classes; expected at most 10"),
        ([{"label": "", "strokes": LINE}], "a class is named ''; expected a name of its own"),
        ([{"label": "not sure", "strokes": LINE}], "a class is named 'not sure'"),
        ([{"strokes": LINE}], "label is missing; expected a str"),
        ([{"label": "a", "strokes": [[1, 2]]}], "a drawing of 'a' is no list of strokes"),
        ([{"label": "a", "strokes": []}], "there is nothing to draw"),
    ],
)
def test_refused_examples(examples, message):
    with pytest.raises(ValueError, match=message):
        answer({"examples": examples, "query": LINE})


def test_refused_strokes():
    with pytest.raises(ValueError, match="query has a point that is not finite"):
        read_strokes("query", [[[0, float("nan")]]])
    with pytest.raises(ValueError, match="query has 20,001 points; expected at most 20,000"):
        read_strokes("query", [[[0, 0]] * (MOST_POINTS + 1)])
    with pytest.raises(ValueError, match="query is no list of strokes"):
        read_strokes("query", 3)
    assert read_strokes("query", [[], [[1, 2]]]) == [[(1.0, 2.0)]]
