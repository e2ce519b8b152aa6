"""A served classifier speaks MLflow's scoring protocol, answers many at once, refuses clearly, and stops in order."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.batching import Batcher, Overloaded
from jobs.scoring_protocol import Refused, texts_of
from jobs.use import predict
from pipeline import export
from tests.jobs.commands import gristmill
from tests.pipeline.toy_export import WORDS, classifier_folder, subject_of

JSON, CSV = "application/json", "text/csv"
TEXTS = ["a, b", 'say "why"\nnow', "été"]
GOOD: list[tuple[str, Any]] = [
    (JSON, {"inputs": TEXTS}),
    (JSON, {"inputs": [{"text": text, "id": 1} for text in TEXTS]}),
    (JSON, {"inputs": {"text": TEXTS}, "params": {"ignored": 1}}),
    (JSON, {"instances": TEXTS}),
    (JSON, {"instances": [{"only": text} for text in TEXTS]}),
    (JSON, {"dataframe_records": [{"id": 1, "text": text} for text in TEXTS]}),
    (JSON, {"dataframe_split": {"index": [3, 4, 5], "columns": ["text"], "data": [[text] for text in TEXTS]}}),
    (JSON, {"dataframe_split": {"columns": ["n", "text"], "data": [[1, text] for text in TEXTS]}}),
    (JSON, {"dataframe_split": {"data": [[text] for text in TEXTS]}}),
    ("application/json; charset=UTF-8", {"inputs": TEXTS}),
    ('application/json; charset="utf-8"', {"inputs": TEXTS}),
    (CSV, 'text\n"a, b"\n"say ""why""\nnow"\nété\n'),
    (CSV, ',text\r\n0,"a, b"\r\n1,"say ""why""\nnow"\r\n2,été\r\n'),
]
"""Requests for TEXTS, in every form."""

BAD: list[tuple[str, bytes, int, str]] = [
    (JSON, b"{", 400, "not valid JSON"),
    (JSON, b"\xff", 400, "not valid JSON"),
    (JSON, b'{"inputs": ["\\ud800"]}', 400, "not valid JSON"),
    (JSON, b'["a"]', 400, "exactly one of inputs, instances, dataframe_records, dataframe_split"),
    (JSON, b'{"input": ["a"]}', 400, "exactly one of"),
    (JSON, b'{"inputs": ["a"], "instances": ["a"]}', 400, "exactly one of"),
    (JSON, b'{"inputs": "a"}', 400, "inputs: a list of texts is needed"),
    (JSON, b'{"inputs": ["a", 5]}', 400, "inputs: number 1 is 5, not a text"),
    (JSON, b'{"inputs": ["a", null]}', 400, "number 1 is None"),
    (JSON, b'{"inputs": [["a"]]}', 400, "number 0 is ['a']"),
    (JSON, b'{"inputs": [{"a": "x", "b": "y"}]}', 400, "a column 'text', or a single column"),
    (JSON, b'{"dataframe_records": ["a"]}', 400, "dataframe_records: a list of objects"),
    (JSON, b'{"dataframe_records": [{"text": "a"}, {"txt": "b"}]}', 400, "number 1 is None"),
    (JSON, b'{"dataframe_split": [["a"]]}', 400, "dataframe_split: columns and, row by row, data"),
    (JSON, b'{"dataframe_split": {"columns": ["text"], "data": [["a", "b"]]}}', 400, "columns and, row by row"),
    (CSV, b"", 400, "CSV: a header is needed"),
    (CSV, b"a,b\nx,y\n", 400, "a column 'text', or a single column"),
    (CSV, b"text,b\nx\n", 400, "CSV: record 2 has 1 fields, the header 2"),
    (CSV, b'text\n"x\n', 400, "not valid CSV"),
    (CSV, b"text\n\xff\n", 400, "not valid CSV in UTF-8"),
    ("image/png", b"x", 415, "send application/json or text/csv"),
    ("application/json; charset=latin-1", b"{}", 415, "in UTF-8"),
]


@pytest.mark.parametrize(("kind", "body"), GOOD)
def test_every_form_of_the_protocol_is_read(kind: str, body: Any):
    assert texts_of((body if kind == CSV else json.dumps(body)).encode(), kind) == TEXTS


def test_a_field_of_a_table_may_be_as_long_as_a_request():
    text = "long " * 100_000
    assert texts_of(f"text\n{text}\n".encode(), CSV) == [text]


@pytest.mark.parametrize(("kind", "body", "status", "message"), BAD)
def test_what_cannot_be_read_is_refused_in_one_sentence(kind: str, body: bytes, status: int, message: str):
    with pytest.raises(Refused, match=re.escape(message)) as caught:
        texts_of(body, kind)
    assert caught.value.status == status
    assert len(str(caught.value)) < 400


@settings(max_examples=200)
@given(
    body=st.binary(max_size=60)
    | st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3))
    .flatmap(
        lambda x: st.sampled_from(["inputs", "instances", "dataframe_records", "dataframe_split", "x"]).map(
            lambda k: {k: x}
        )
    )
    .map(lambda value: json.dumps(value).encode()),
    kind=st.sampled_from([JSON, CSV]),
)
def test_any_body_is_texts_or_a_refusal(body: bytes, kind: str):
    try:
        texts, status = texts_of(body, kind), 200
    except Refused as error:
        texts, status = [], error.status
    assert all(isinstance(text, str) for text in texts)
    assert status in (200, 400)


def scored(texts: Sequence[str]) -> np.ndarray:
    if "bad" in texts:
        raise ValueError("bad")
    return np.array([[float(len(text))] for text in texts], np.float32)


def test_requests_that_wait_share_a_pass_and_get_their_own_rows():
    passes: list[int] = []

    def score(texts: Sequence[str]) -> np.ndarray:
        passes.append(len(texts))
        return scored(texts)

    async def main() -> list[np.ndarray]:
        batcher = Batcher(score, max_batch=8, max_wait_seconds=0.2)
        async with batcher.running():
            return await asyncio.gather(*(batcher.answer(["x" * i, "y"]) for i in range(20)))

    answers = asyncio.run(main())
    assert [answer[:, 0].tolist() for answer in answers] == [[i, 1] for i in range(20)]
    assert passes == [8, 8, 8, 8, 8]


def test_a_request_that_fails_spoils_no_other():
    async def main() -> list[Any]:
        batcher = Batcher(scored, max_batch=9, max_wait_seconds=0.05)
        async with batcher.running():
            texts = ["good", "bad", "fine"]
            return await asyncio.gather(*(batcher.answer([text]) for text in texts), return_exceptions=True)

    good, bad, fine = asyncio.run(main())
    assert isinstance(bad, ValueError)
    assert (good.item(), fine.item()) == (4, 4)


def test_more_than_can_wait_is_turned_away():
    async def main() -> None:
        batcher = Batcher(scored, max_batch=9, max_wait_seconds=0)
        async with batcher.running():
            waiting = asyncio.create_task(batcher.answer(["x"] * 100_000))
            await asyncio.sleep(0)
            with pytest.raises(Overloaded):
                await batcher.answer(["x"])
            assert (await waiting).shape == (100_000, 1)
            assert (await batcher.answer(["x"])).shape == (1, 1)

    asyncio.run(main())


@dataclass(frozen=True)
class Served:
    """A server in a process of its own, with what it said when it was ready."""

    process: subprocess.Popen[str]
    said: str
    port: int

    def send(self, method: str, path: str, body: bytes = b"", kind: str = JSON) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": kind})
        return connection

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = JSON) -> tuple[int, bytes]:
        return answer_to(self.send(method, path, body, kind))

    def predictions(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        status, body = self.ask("POST", "/invocations", inputs(texts))
        assert status == 200, body
        return json.loads(body)["predictions"]


def inputs(texts: Sequence[str]) -> bytes:
    return json.dumps({"inputs": texts}).encode()


def answer_to(connection: http.client.HTTPConnection) -> tuple[int, bytes]:
    with contextlib.closing(connection):
        response = connection.getresponse()
        return response.status, response.read()


def started(model: str, *arguments: str) -> Served:
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "serve", model, "--port", "0", "--max-body-mib", "1", *arguments],
        env=os.environ | {"PYTHONPATH": "."},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)", said)
    assert found, process.communicate()[1]
    return Served(process, said, int(found[1]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("model")
    files = classifier_folder(root / "artifact")
    (root / "export").mkdir()
    export.load("hf").write(root / "export", subject_of(files, 1.7)[0])
    return str(root / "export")


@pytest.fixture(scope="module")
def served(model: str) -> Iterator[Served]:
    server = started(model)
    yield server
    server.process.send_signal(signal.SIGTERM)
    out, err = server.process.communicate(timeout=60)
    assert (server.process.returncode, out, err) == (0, "", "")


@pytest.mark.slow
def test_two_hundred_requests_of_sixteen_clients_get_the_answers_of_predict(served: Served, model: str):
    batches = [[f"{word} {i}" for word in (WORDS * 3)[: 1 + i % 5]] for i in range(200)]
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(served.predictions, batches))
    for texts, answer in zip(batches[::10], answers[::10], strict=True):
        for ours, theirs in zip(predict(model, texts), answer, strict=True):
            assert theirs["label"] == ours["label"]
            assert theirs["probabilities"] == pytest.approx(ours["probabilities"], abs=1e-6)
    assert [len(answer) for answer in answers] == [len(texts) for texts in batches]


@pytest.mark.slow
def test_it_answers_as_mlflow_does_and_says_how_to_ask(served: Served):
    assert served.ask("GET", "/ping") == (200, b"\n")
    assert served.ask("GET", "/health") == (200, b"\n")
    assert served.ask("GET", "/version") == (200, version("mlflow").encode())
    assert served.ask("POST", "/invocations", b'{"inputs": []}') == (200, b'{"predictions":[]}')
    status, body = served.ask("POST", "/invocations", b"text\na dog\n", CSV)
    assert (status, json.loads(body)["predictions"]) == (200, served.predictions(["a dog"]))
    curl = re.search(r"curl (\S+) -H '([^']*)' -d '([^']*)'", served.said)
    assert curl
    assert curl[1].endswith(f":{served.port}/invocations")
    assert len(served.predictions(json.loads(curl[3])["inputs"])) == 2


@pytest.mark.slow
def test_mlflow_s_own_client_is_answered(served: Served):
    import pandas as pd
    from mlflow.pyfunc.scoring_server.client import ScoringServerClient

    answer = ScoringServerClient("127.0.0.1", served.port).invoke(pd.DataFrame({"text": ["the cat", "a dog"]}))
    assert answer.get_predictions().to_dict("records") == served.predictions(["the cat", "a dog"])


@pytest.mark.slow
def test_a_bad_request_is_one_message_in_json(served: Served):
    for kind, sent, status, message in BAD:
        got, body = served.ask("POST", "/invocations", sent, kind)
        assert got == status
        assert message in json.loads(body)["message"]
        assert json.loads(body).keys() == {"error_code", "message"}


@pytest.mark.slow
def test_too_many_texts_are_refused(served: Served):
    status, body = served.ask("POST", "/invocations", json.dumps({"inputs": [""] * 100_001}).encode())
    assert (status, json.loads(body)["error_code"]) == (413, "REQUEST_TOO_LARGE")
    assert "100,001 texts: a request may hold 100,000" in json.loads(body)["message"]


@pytest.mark.slow
def test_too_large_a_body_is_refused_by_its_length_and_as_it_comes(served: Served):
    status, body = served.ask("POST", "/invocations", b"x" * ((1 << 20) + 1))
    assert (status, json.loads(body)["error_code"]) == (413, "REQUEST_TOO_LARGE")
    with socket.create_connection(("127.0.0.1", served.port)) as connection:  # in chunks, without a length
        connection.sendall(b"POST /invocations HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"%x\r\n%s\r\n" % (1 << 16, b"x" * (1 << 16))
        for _ in range(17):
            connection.sendall(chunk)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert served.predictions(["still there"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_it_finishes_what_is_in_flight_and_stops(model: str, number: signal.Signals):
    server = started(model, "--max-wait-ms", "1000")
    asked = [server.send("POST", "/invocations", inputs(["the cat"])) for _ in range(4)]
    assert server.ask("GET", "/ping")[0] == 200  # so the server has those before it, which wait for more to come
    server.process.send_signal(number)
    for connection in asked:
        status, body = answer_to(connection)
        assert (status, len(json.loads(body)["predictions"])) == (200, 1)
    out, err = server.process.communicate(timeout=60)
    assert (server.process.returncode, out, err) == (0, "", "")


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_message(model: str, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = gristmill(tmp_path, "serve", model, "--port", str(port))
    assert done.returncode == 3
    assert f"127.0.0.1:{port}: cannot listen there" in done.stderr
    assert "Traceback" not in done.stderr
