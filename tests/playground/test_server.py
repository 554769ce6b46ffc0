"""The server answers this machine's own page alone, and shows refusals as sentences."""

import http.client
import json
import re
import threading

import pytest

from ibaml import cli
from ibaml.playground import server
from ibaml.playground.server import make_server, page_files, respond


@pytest.fixture(scope="module")
def port():
    with make_server(0) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found.server_port
        found.shutdown()
        thread.join()


def call(port, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, names)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


JSON = {"Content_Type": "application/json"}


def test_the_page_is_served_with_leave_to_load_itself_alone(port):
    response, content = call(port, "GET", "/")
    assert response.status == 200 and b"ibaml playground" in content
    assert response.getheader("Content-Security-Policy").startswith("default-src 'self'; img-src 'self' data:;")
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert response.getheader("Server") == "ibaml"
    for name, content in page_files().items():
        assert call(port, "GET", f"/{name}?v=1")[1] == content


@pytest.mark.parametrize("path", ["/nothing.js", "/../server.py", "/..%2Fserver.py", "/models/curves/model.json"])
def test_nothing_else_is_served(port, path):
    assert call(port, "GET", path)[0].status == 404


def test_the_page_names_no_other_machine():
    text = b"\n".join(page_files().values()).decode()
    assert set(re.findall(r"https?://[^\s\"'`)]*|//[a-z0-9]+\.[^\s\"']*", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text and "@font-face" not in text


def test_an_answer(port):
    response, content = call(port, "POST", "/api/curve", json.dumps({"points": [[0, 1]]}), **JSON)
    assert response.status == 200
    answered = json.loads(content)
    assert answered["points"] == [[0, 1]] and answered["warnings"] == []


def test_a_refusal_is_a_sentence(port):
    response, content = call(port, "POST", "/api/curve", json.dumps({"points": [[9, 1]]}), **JSON)
    assert response.status == 400
    assert json.loads(content) == {"error": "point 1 has x = 9; expected a number from -5 to 5."}


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        ({"Host": "evil.example:80", **JSON}, 403, "only the playground's own page is answered."),
        ({"Origin": "http://evil.example", **JSON}, 403, "only the playground's own page is answered."),
        ({"Content_Type": "text/plain"}, 415, "expected a request of application/json."),
    ],
)
def test_other_pages_are_refused(port, headers, status, message):
    response, content = call(port, "POST", "/api/curve", '{"points": []}', **headers)
    assert response.status == status and json.loads(content) == {"error": message}


def test_pages_are_refused_under_another_name(port):
    assert call(port, "GET", "/", Host="evil.example")[0].status == 403
    assert call(port, "GET", "/", Host=f"localhost:{port}")[0].status == 200


def test_too_large_a_request_is_refused_unread(port, monkeypatch):
    monkeypatch.setattr(server, "MOST_BYTES", 2**20)
    response, content = call(port, "POST", "/api/curve", b"0", Content_Length=str(2**21), **JSON)
    assert response.status == 413
    assert json.loads(content) == {"error": "the request has 2 MiB; expected at most 1 MiB: upload less at a time."}


@pytest.mark.parametrize(
    ("tab", "body", "message"),
    [
        ("nothing", b"{}", "there is no tab 'nothing'; expected one of draw, curve, table, model."),
        ("curve", b"[]", "the request is a list; expected an object."),
        ("curve", b"{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("curve", b"{}", "points is missing; expected a list."),
        ("model", b'{"folder": "no/such"}', None),
    ],
)
def test_refused_requests(tab, body, message):
    status, answered = respond(tab, body)
    assert status in (400, 404)
    assert message is None or answered == {"error": message}


def test_warnings_are_told_once(monkeypatch):
    def warns(asked):
        for _ in range(2):
            server.warnings.warn("a gap in column a", RuntimeWarning, stacklevel=1)
        return {}

    monkeypatch.setattr(server, "TABS", {"curve": warns})
    assert respond("curve", b"{}") == (200, {"warnings": ["a gap in column a"]})


def test_refused_ports(port):
    with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 cannot be opened"):
        make_server(port)
    with pytest.raises(ValueError, match="port is 70000; expected a number from 0"):
        make_server(70_000)


def test_serving_says_where_and_opens_the_page(monkeypatch):
    opened, said = [], []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(server.ThreadingHTTPServer, "serve_forever", lambda self: None)
    server.serve(0, open_page=True, say=said.append)
    assert opened[0].startswith("http://127.0.0.1:") and opened[0] in said[0]
    server.serve(0, open_page=False, say=said.append)
    assert len(opened) == 1 and len(said) == 2


def test_the_options_of_the_command(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["playground", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "--port" in shown and "--no-open" in shown


def test_the_command_serves(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(server, "serve", lambda port, *, open_page, say: asked.append((port, open_page)))
    for arguments in ([], ["--port", "0", "--no-open"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(["playground", *arguments])
        assert caught.value.code == 0
    assert asked == [(7860, True), (0, False)]


def test_a_taken_port_is_a_sentence_on_the_command_line(port, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["playground", "--port", str(port), "--no-open"])
    assert caught.value.code == 2
    assert f"port {port} of 127.0.0.1 cannot be opened" in capsys.readouterr().err
