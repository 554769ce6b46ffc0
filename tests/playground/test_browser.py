"""The playground in a real browser: it draws, clicks, pastes and uploads, and reads what the page says.

``IBAML_SCREENSHOTS=docs/images`` keeps the pictures that the documentation shows.
"""

import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from benchmarks.pen import sketch
from tests.playground.webdriver import Browser, find_programs

from ibaml import MetaLearner
from ibaml.playground.server import make_server
from ibaml.playground.strokes import draw
from ibaml.playground.train import DRAWINGS, MODELS

PROGRAMS = find_programs()
MISSING = [name for name, path in PROGRAMS.items() if path is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (Debian: chromium, chromium-driver)"
    ),
]


@pytest.fixture(scope="module")
def address():
    with make_server(0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory, address):
    found = Browser(PROGRAMS, tmp_path_factory.mktemp("browser"))
    yield found
    found.close()


@pytest.fixture
def page(browser, address):
    """The browser at 1280 x 800 with the page loaded anew; its console has to stay silent."""
    browser.resize(1280, 800)
    browser.complaints()
    browser.open("about:blank")

    def at(tab):
        browser.open(f"{address}#{tab}")
        return browser

    yield at
    remote = browser.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert remote and all(url.startswith(address) for url in remote)
    assert [text for text in browser.complaints() if "400 (Bad Request)" not in text] == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = os.environ.get("IBAML_SCREENSHOTS")
    return tmp_path_factory.mktemp("pictures") if folder is None else Path(folder)


def strokes_of(figure, seed):
    """Returns a sketch as fractions of the canvas, with every third of its points, as a quick hand leaves them."""
    lines = sketch(figure, np.random.default_rng(seed))
    return [[(x / 280, y / 280) for x, y in (*line[::3], line[-1])] for line in lines]


def settle(browser):
    """Waits until all questions of the page are answered."""
    browser.wait(lambda: browser.run("return document.querySelector('[aria-busy=true]') === null"), "answers")


def test_draw(page, pictures):
    browser = page("draw")
    for row, figure in enumerate(("house", "star")):
        for seed in (1, 2):
            browser.drag("#teach", strokes_of(figure, seed))
            browser.click(f"#add-{row}")
    browser.drag("#ask", strokes_of("house", 7))
    assert browser.wait_for_text("#verdict", "A, ").endswith("sure")
    settle(browser)
    assert browser.run("return document.querySelectorAll('#history tbody tr').length") == 2
    assert "nats of at most 0.69" in browser.text("#uncertainty")
    browser.screenshot(pictures / "playground_draw.png")

    browser.click("#ask-clear")
    browser.drag("#ask", strokes_of("spiral", 7))
    browser.wait_for_text("#verdict", "None of these")
    settle(browser)
    assert "above 0" in browser.text("#uncertainty")
    browser.screenshot(pictures / "playground_none.png")

    # Its class taught, the same question has an answer.
    browser.click("#add-class")
    for seed in (3, 4, 5):
        browser.drag("#teach", strokes_of("spiral", seed))
        browser.click("#add-2")
    browser.wait_for_text("#verdict", "C, ")


def test_draw_by_keyboard_and_on_a_phone(page, pictures):
    browser = page("draw")
    browser.resize(390, 844, phone=True)
    browser.click("#draw-example")
    browser.wait_for_text("#verdict", "None of these")
    browser.click("#ask-clear")
    browser.wait_for_text("#verdict", "Draw a question.")
    browser.run("document.getElementById('ask').focus()")
    right, left, up, down, space = "\ue014", "\ue012", "\ue013", "\ue015", " "
    browser.press(*[left] * 8, space, *[right] * 16, space, *[left] * 8, *[up] * 8, space, *[down] * 16, space)
    browser.wait_for_text("#verdict", "cross, ")
    settle(browser)
    assert browser.run("return document.documentElement.scrollWidth") == 390
    browser.run("document.querySelector('.wide').scrollIntoView()")
    browser.screenshot(pictures / "playground_phone.png")


def test_tabs_by_keyboard_and_as_wide_as_a_phone(page):
    browser = page("draw")
    browser.resize(390, 844, phone=True)
    browser.run("document.getElementById('tab-draw').focus()")
    for tab in ("curve", "table", "model", "draw"):
        browser.press("\ue014")
        browser.wait(lambda tab=tab: browser.run("return !document.getElementById(arguments[0]).hidden", tab), tab)
        assert browser.run("return document.activeElement.id") == f"tab-{tab}"
        assert browser.run("return document.querySelectorAll('[role=tabpanel]:not([hidden])').length") == 1
        assert browser.run("return document.documentElement.scrollWidth") == 390
    settle(browser)


def test_curve(page, pictures):
    browser = page("curve")
    browser.wait_for_text("#learned-text", "after 0 points")
    for _ in range(2):
        browser.click("#point-wave")
    browser.wait_for_text("#learned-text", "after 2 points")
    browser.run("document.getElementById('plain').scrollIntoView({block: 'center'})")
    browser.drag("#plain", [[(0.5, 0.47)]])
    browser.wait_for_text("#learned-text", "after 3 points")
    learned, plain = (
        float(browser.text(f"#{name}-text").split("band: ")[1].split()[0].rstrip(",.")) for name in ("learned", "plain")
    )
    assert learned < 0.6 * plain
    browser.screenshot(pictures / "playground_curve.png")
    browser.run("document.getElementById('point-x').value = 9")
    browser.click("#point-add")
    browser.wait_for_text("#curve-error", "point 4 has x = 9; expected a number from -5 to 5.")


def test_table(page, pictures):
    browser = page("table")
    browser.click("#table-example")
    browser.wait_for_text("#table-says", "Learned from 16 groups")
    assert browser.run("return document.querySelectorAll('#table-answers tbody tr').length") == 12
    assert browser.run("return document.querySelectorAll('#table-answers tr.next').length") == 2
    browser.screenshot(pictures / "playground_table.png")
    browser.run("document.getElementById('table-text').value = 'a,b\\n1,2'")
    browser.click("#table-go")
    browser.wait_for_text("#table-error", "the table has 2 column(s) (a, b)")


def test_model(page, pictures, tmp_path):
    rng = np.random.default_rng(0)
    parts = []
    for group in range(12):
        hours = rng.uniform(0, 10, 8)
        score = 30 + 4 * rng.normal() + (4 + rng.normal()) * hours + rng.normal(size=8)
        parts.append(pd.DataFrame({"school": f"s{group}", "hours": hours.round(1), "score": score.round(1)}))
    MetaLearner(likelihood="gaussian").fit(pd.concat(parts), task="school", target="score").save(tmp_path / "scores")
    parts[0][:3].to_csv(tmp_path / "known.csv", index=False)
    parts[0][3:].drop(columns="score").to_csv(tmp_path / "asked.csv", index=False)
    parts[0][:3].drop(columns="hours").to_csv(tmp_path / "bad.csv", index=False)

    browser = page("model")
    browser.type("#model-folder", str(tmp_path / "nothing"))
    browser.click("#model-look")
    browser.wait_for_text("#model-error", "nothing has no model.safetensors: it holds no trained model")
    browser.run("document.getElementById('model-folder').value = arguments[0]", str(tmp_path / "scores"))
    browser.type("#model-query", str(tmp_path / "asked.csv"))
    browser.type("#model-support", str(tmp_path / "bad.csv"))
    browser.click("#model-go")
    browser.wait_for_text("#model-error", "the support table has no column hours; its columns are school, score.")
    browser.type("#model-support", str(tmp_path / "known.csv"))
    browser.click("#model-go")
    browser.wait_for_text("#model-says", "5 predictions")
    assert "lower_90" in browser.text("#model-answers")
    assert "columns hours" in browser.text("#model-about")
    assert browser.text("#model-error") == ""
    browser.run("document.getElementById('model-folder').value = 'runs/scores'")
    browser.screenshot(pictures / "playground_model.png")


def test_images_for_a_model(page, tmp_path):
    from PIL import Image

    for archive, seeds in (("support", (1, 2)), ("query", (3,))):
        with zipfile.ZipFile(tmp_path / f"{archive}.zip", "w") as packed:
            for figure in ("house", "star"):
                for seed in seeds:
                    path = tmp_path / "one.png"
                    Image.fromarray(draw(sketch(figure, np.random.default_rng(seed)))[0]).save(path)
                    inside = f"mine/{figure}/{seed}.png" if archive == "support" else f"mine/{figure}.png"
                    packed.write(path, inside)
    browser = page("model")
    browser.type("#model-folder", str(MODELS / DRAWINGS))
    for name in ("support", "query"):
        browser.type(f"#model-{name}", str(tmp_path / f"{name}.zip"))
    browser.click("#model-go")
    browser.wait_for_text("#model-says", "2 predictions")
    rows = browser.run("return [...document.querySelectorAll('#model-answers tbody tr')].map(r => r.textContent)")
    assert rows[0].startswith("house.pnghouse") and rows[1].startswith("star.pngstar")
    assert "images, grey, resized to 28 x 28" in browser.text("#model-about")
