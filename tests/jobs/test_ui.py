"""The pages are for this machine alone, and nothing stays behind when they are closed."""

import http.client
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.mlflow_client import connect, default_uri
from jobs.models import locate
from jobs.track_mlflow import sync
from jobs.ui import command, environment, is_loopback, serve_ui
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.store import Store
from pipeline.tracking import read_journal
from tests.jobs.conftest import Corpus, Export, Pretrain, Run, new_home
from tests.jobs.mlflow_seen import wait_for_first_answer


def test_a_host_that_others_reach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"host=0\.0\.0\.0 can be reached from outside"):
        serve_ui(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", host="0.0.0.0")
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("host", "answer"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.4", False), ("gpu1", False)],
)
def test_only_loopback_is_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


def test_a_busy_port_is_named_with_a_way_out(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(EnvironmentProblem, match=f"port {port} on 127.0.0.1 cannot be used.*--port {port + 1}"):
            serve_ui(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", port=port)


def test_the_server_runs_no_jobs_unpickles_nothing_and_answers_only_its_own_names(tmp_path: Path) -> None:
    words = command(tmp_path, "sqlite:///x", "127.0.0.1", 5001)
    assert words[words.index("--allowed-hosts") + 1] == "127.0.0.1:5001,localhost:5001"
    assert words[words.index("--workers") + 1] == "1"
    assert "sqlite:///x" not in words, "a URI may hold a password, and command lines are public"
    surroundings = environment("sqlite:///x")
    assert surroundings["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    assert surroundings["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


def test_for_the_uri_of_a_server_only_the_link_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve_ui(tmp_path, "http://me:secret@tracker:5000/")
    assert capsys.readouterr().out == "http://me:***@tracker:5000/#/experiments?workflowType=machine_learning\n"


SERVE = """
import sys
from pathlib import Path
from jobs.ui import serve_ui
serve_ui(Path(sys.argv[1]), sys.argv[2], port=int(sys.argv[3]))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(port: int, host: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/", headers={"Host": host})
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[int]:
    """The port of pages that a person opened; Ctrl-C ends them, and nothing listens any more."""
    home, port = new_home(tmp_path_factory.mktemp("served"), database), free_port()
    words = [sys.executable, "-c", SERVE, str(home), default_uri(home), str(port)]
    ui = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    link = ui.stdout.readline()
    assert link.startswith(f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning")
    wait_for_first_answer(port)
    yield port
    ui.send_signal(signal.SIGINT)
    code = ui.wait(60)
    ui.stdout.close()
    assert code == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=1)


@pytest.mark.slow
def test_the_pages_are_served_to_this_machine_only(served: int) -> None:
    assert answer(served, f"127.0.0.1:{served}") == 200
    assert answer(served, "evil.example.com") == 403


@pytest.mark.slow
def test_a_run_is_sent_to_a_server_and_its_model_fetched_from_there(served: int, home: Path, run_toy: Run) -> None:
    uri = f"http://127.0.0.1:{served}"
    record = run_toy([Export(base=Pretrain(corpus=Corpus()))], register_name="clf")
    mirrored = sync(home, record.run, uri)
    assert mirrored.model_uri == "models:/clf/1"
    assert sync(home, record.run, uri) == mirrored

    client = connect(uri)
    runs = {run.info.run_name: run for run in client.search_runs([mirrored.experiment_id])}
    assert len(runs) == 4
    history = client.get_metric_history(runs["2-pretrain"].info.run_id, "train/loss")
    journal = read_journal(Store(home).journal("pretrain", str(record.stage("pretrain").key)))
    assert [(m.step, m.timestamp) for m in history] == [(point.step, point.timestamp_ms) for point in journal]

    folder = locate("clf", home, uri)
    assert folder.is_relative_to(home / "models")
    assert locate("clf", home, uri) == folder

    client.delete_registered_model("clf")
    other = run_toy([Export(base=Pretrain(corpus=Corpus()), seed=1)], plan="other", register_name="clf")
    assert sync(home, other.run, uri).model_uri == "models:/clf/1"
    assert locate("clf", home, uri) != folder, "the old version 1 is not taken for the new one"
