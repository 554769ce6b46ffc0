"""Just enough of a WebDriver client (https://www.w3.org/TR/webdriver2/) to use a page in headless Chromium."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_PROGRAMS = {
    "Chromium": ("chromium", "chromium-browser", "google-chrome"),
    "chromedriver": ("chromedriver", "chromium.chromedriver"),
}


def find_programs() -> dict[str, str | None]:
    """Returns the paths of browser and driver; None for one that is not installed."""
    return {
        name: next((path for each in candidates if (path := shutil.which(each))), None)
        for name, candidates in _PROGRAMS.items()
    }


class Browser:
    """One window of a headless browser, with the page that it shows."""

    def __init__(self, programs: dict[str, str | None], folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._log = (folder / "chromedriver.log").open("w")
        self._driver = subprocess.Popen(
            [programs["chromedriver"], f"--port={port}"], stdout=self._log, stderr=self._log
        )
        self._address = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
                     "--force-color-profile=srgb", f"--user-data-dir={folder / 'profile'}"]  # fmt: skip
        options = {"binary": programs["Chromium"], "args": arguments}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        try:
            self.wait(self._is_up, "chromedriver to start", seconds=60)
            found = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.close()
            raise
        self._address += f"/session/{found['sessionId']}"

    def close(self) -> None:
        if "/session/" in self._address:
            self._call("DELETE", "")
        self._driver.terminate()
        self._driver.wait(timeout=30)
        self._log.close()

    def _is_up(self) -> bool:
        try:
            return self._call("GET", "/status")["ready"]
        except urllib.error.URLError:
            return False

    def _call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._address + path, data, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{method} {path}: {json.load(error)['value']['message'][:500]}") from None

    def wait(self, check, what: str, *, seconds: float = 60):
        """Returns what ``check`` returns once it is true."""
        end = time.monotonic() + seconds
        while not (found := check()):
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds} seconds for {what}")
            time.sleep(0.05)
        return found

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments):
        """Runs JavaScript in the page and returns its value."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> str:
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[_ELEMENT]

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self.element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Types into an element, or gives the path of a file to an input of files."""
        self._call("POST", f"/element/{self.element(selector)}/value", {"text": text})

    def text(self, selector: str) -> str:
        """Returns the text that is seen, nothing of what is hidden."""
        return self._call("GET", f"/element/{self.element(selector)}/text")

    def wait_for_text(self, selector: str, part: str) -> str:
        def found() -> str:
            text = self.text(selector)
            return text if part in text else ""

        try:
            return self.wait(found, f"{part!r} in {selector}")
        except AssertionError as error:
            raise AssertionError(f"{error}, which says {self.text(selector)!r}") from None

    def drag(self, selector: str, strokes) -> None:
        """Draws lines with the pointer; points are fractions of the element's width and height."""
        box = self.run(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
            "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]",
            selector,
        )
        moves = []
        for stroke in strokes:
            places = [(round(box[0] + x * box[2]), round(box[1] + y * box[3])) for x, y in stroke]
            step = {"type": "pointerMove", "duration": 0, "origin": "viewport"}
            first, *others = [{**step, "x": x, "y": y} for x, y in places]
            moves += [first, {"type": "pointerDown", "button": 0}, *others, {"type": "pointerUp", "button": 0}]
        pointer = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": moves}
        self._call("POST", "/actions", {"actions": [pointer]})

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def complaints(self) -> list[str]:
        """Returns what the browser's console said since it was last asked."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]
