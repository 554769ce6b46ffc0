"""The server under load: no answer but the right one, whatever else is asked at the same time."""

import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ibaml import MetaLearner
from ibaml.networks import MLP

RNG = np.random.default_rng(0)


def task(num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    x = RNG.normal(size=(num_rows, 3))
    return x, x @ RNG.normal([2, -2, 0], 0.3)


@pytest.fixture(scope="module")
def learner() -> MetaLearner:
    network = MLP(1, input_shape=3, hidden_sizes=(4,), norm="none")
    return MetaLearner(network, "maml", likelihood="gaussian").fit([task(12) for _ in range(4)], num_steps=1)


@pytest.fixture(scope="module")
def served(learner, load_example):
    example = load_example("serve")
    server = example.make_server(learner, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield example, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def post(address: str, body: bytes) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(address, body, timeout=60) as response:  # noqa: S310 - a server of our own
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def test_every_answer_under_load_is_that_of_one_thread(learner, served):
    example, address = served
    requests = []
    for index in range(40):
        x, y = task(4 + index % 5)
        requests.append({"x_support": x.tolist(), "y_support": y.tolist(), "x_query": task(3)[0].tolist()})
    expected = [example.answer(learner, request) for request in requests]
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda request: post(address, json.dumps(request).encode()), 5 * requests))
    assert found == [(200, one) for one in 5 * expected]
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "Expecting property name"),
        ("[" * 100_000, "recursion"),
        ("{}", "the request has no 'x_support'"),
        ('{"x_support": [[1, 2]], "y_support": [1], "x_query": [[1, 2, 3]]}', "x_support has shape"),
        ('{"x_support": [[1, 2, NaN]], "y_support": [1], "x_query": [[1, 2, 3]]}', "x_support has 1 missing"),
    ],
)
def test_what_is_refused_says_why(served, body, message):
    status, found = post(served[1], body.encode())
    assert status == 400 and message in found["error"]


def test_large_requests_are_not_read(served, monkeypatch):
    example, address = served
    monkeypatch.setattr(example, "MOST_BYTES", 3)
    status, found = post(address, b'{"x": 1}')
    assert status == 400 and "the request has 8 bytes, and at most 3 are read" in found["error"]
