"""The page and its answers over HTTP, for this machine alone.

The standard library serves it, so that nothing has to be installed. What keeps it to this machine: it listens on the
loopback address; requests under another name than this machine's are refused (DNS rebinding), as are those of other
pages (a JSON body cannot be sent across origins without leave, which is never given); and the page may load nothing
from elsewhere (Content-Security-Policy).
"""

import contextlib
import http
import importlib.resources
import json
import threading
import warnings
import webbrowser
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from ibaml.playground import curve, draw, model, table
from ibaml.playground.requests import Answer, Answered

HOST = "127.0.0.1"
TABS: Mapping[str, Answer] = {
    "draw": draw.answer,
    "curve": curve.answer,
    "table": table.answer,
    "model": model.answer,
}
"""What answers the requests of each tab, by its name."""

MOST_BYTES = 64 * 2**20
"""Of a request: what is uploaded comes in it."""

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_MENDABLE = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)
"""What a user can mend; its sentence is shown."""


def page_files() -> dict[str, bytes]:
    """Returns the files of the page by their names."""
    folder = importlib.resources.files("ibaml.playground") / "page"
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.endswith(tuple(_TYPES))}


def respond(tab: str, body: bytes) -> tuple[http.HTTPStatus, Answered]:
    """Answers a request of a tab; a refusal has the sentence ``error``.

    Args:
        tab: Name of the tab.
        body: A JSON object.
    """
    if tab not in TABS:
        return http.HTTPStatus.NOT_FOUND, {"error": f"there is no tab {tab!r}; expected one of {', '.join(TABS)}."}
    try:
        asked = json.loads(body)
        if not isinstance(asked, dict):
            raise ValueError(f"the request is a {type(asked).__name__}; expected an object.")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answered = TABS[tab](asked)
    except _MENDABLE as error:
        return http.HTTPStatus.BAD_REQUEST, {"error": str(error)}
    told = [str(each.message) for each in caught if issubclass(each.category, RuntimeWarning)]
    return http.HTTPStatus.OK, {**answered, "warnings": list(dict.fromkeys(told))}


class Handler(BaseHTTPRequestHandler):
    """Answers one request; see the module."""

    files: ClassVar[Mapping[str, bytes]] = {}
    port: ClassVar[int] = 0
    # Warnings are caught for the whole process, and a model computes on all cores anyway.
    one_at_a_time: ClassVar[threading.Lock] = threading.Lock()

    def version_string(self) -> str:
        """Names the server, and nothing of the machine."""
        return "ibaml"

    def do_GET(self) -> None:
        """Sends a file of the page."""
        name = self.path.split("?")[0].removeprefix("/") or "index.html"
        if not self._is_local():
            return
        if name not in self.files:
            self._send(http.HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"there is no such file\n")
            return
        self._send(http.HTTPStatus.OK, _TYPES[name[name.rindex(".") :]], self.files[name])

    def do_POST(self) -> None:
        """Answers a tab."""
        if not self._is_local():
            return
        # Before the body is read, which is not wanted.
        if self.headers.get_content_type() != "application/json":
            self._answer(http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "expected a request of application/json."})
            return
        length = int(self.headers.get("Content-Length") or 0)
        if length > MOST_BYTES:
            most = f"{MOST_BYTES // 2**20} MiB"
            self.close_connection = True
            self._answer(
                http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                {"error": f"the request has {length / 2**20:.0f} MiB; expected at most {most}: upload less at a time."},
            )
            return
        body = self.rfile.read(length)
        with self.one_at_a_time:
            status, answered = respond(self.path.removeprefix("/api/"), body)
        self._answer(status, answered)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: what is asked is the user's own affair."""

    def _is_local(self) -> bool:
        names = {f"{name}:{self.port}" for name in (HOST, "localhost")}
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        if host in names and (origin is None or origin in {f"http://{name}" for name in names}):
            return True
        self.close_connection = True
        self._answer(http.HTTPStatus.FORBIDDEN, {"error": "only the playground's own page is answered."})
        return False

    def _answer(self, status: http.HTTPStatus, answered: Answered) -> None:
        # NaN is no JSON, and a browser would stop at it.
        self._send(status, "application/json", json.dumps(answered, allow_nan=False).encode())

    def _send(self, status: http.HTTPStatus, content_type: str, content: bytes) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": content_type, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        # A page that was closed meanwhile misses nothing.
        with contextlib.suppress(ConnectionError):
            self.end_headers()
            self.wfile.write(content)


def make_server(port: int) -> ThreadingHTTPServer:
    """Returns a server on this machine's loopback address; its ``server_address`` has the port.

    Args:
        port: Port; 0 takes a free one.

    Raises:
        OSError: If the port is taken.
        ValueError: If there is no such port.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}; expected a number from 0 (any free one) to 65535.")

    class PageHandler(Handler):
        files = page_files()

    try:
        server = ThreadingHTTPServer((HOST, port), PageHandler)
    except OSError as error:
        raise OSError(
            f"port {port} of {HOST} cannot be opened ({error.strerror}): take another one, such as --port 0."
        ) from error
    PageHandler.port = server.server_port
    return server


def serve(port: int, *, open_page: bool, say: Callable[[str], None]) -> None:
    """Serves the page until interrupted.

    Args:
        port: Port; 0 takes a free one.
        open_page: Whether a browser is opened.
        say: Told where the page is.

    Raises:
        OSError: If the port is taken.
        ValueError: If there is no such port.
    """
    with make_server(port) as server:
        address = f"http://{HOST}:{server.server_port}/"
        say(f"The playground is at {address} (this machine alone; Ctrl-C ends it).")
        if open_page:
            webbrowser.open(address)
        server.serve_forever()
