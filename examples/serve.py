"""Answers over HTTP: one learner, many requests at once, each with a task's known examples and the rows to predict.

    python examples/serve.py my_model --port 8000
    curl localhost:8000 -d '{"x_support": [[1.0, 2.0]], "y_support": [3.0], "x_query": [[2.0, 1.0]]}'

A learner answers from many threads as it does from one. What it refuses comes back as status 400 with the reason, so
that a client that sends wrong data learns why. The server is the standard library's, for a local network that is
trusted: it knows no passwords and no encryption.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ibaml import MetaLearner

MOST_BYTES = 10_000_000


def answer(learner: MetaLearner, request: dict[str, Any]) -> dict[str, Any]:
    """Adapts to the known examples of a request and predicts the others."""
    posterior = learner.adapt(request["x_support"], request["y_support"])
    prediction = posterior.predict(request["x_query"])
    if hasattr(prediction, "probs"):
        return {"classes": prediction.classes.tolist(), "probabilities": prediction.probs.tolist()}
    lower, upper = prediction.interval(0.9)
    return {"mean": prediction.mean.tolist(), "lower_90": lower.tolist(), "upper_90": upper.tolist()}


def make_server(learner: MetaLearner, port: int, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """Returns a server that is ready to serve; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                size = int(self.headers.get("Content-Length", 0))
                if size > MOST_BYTES:
                    raise ValueError(f"the request has {size} bytes, and at most {MOST_BYTES} are read")
                status, body = 200, answer(learner, json.loads(self.rfile.read(size)))
            except KeyError as error:
                status, body = 400, {"error": f"the request has no {error}"}
            except (ValueError, TypeError, FloatingPointError, RecursionError) as error:
                status, body = 400, {"error": str(error)}
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Prints nothing for each request."""

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a trained model, as MetaLearner.save writes it")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    server = make_server(MetaLearner.load(options.model), options.port)
    print(f"Serving {options.model} on http://127.0.0.1:{server.server_port}; Ctrl-C ends it.", flush=True)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    main()
