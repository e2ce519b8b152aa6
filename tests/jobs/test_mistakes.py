"""What becomes of a place that cannot be, a server that is away, and a reader that has gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli
from jobs.home import home
from jobs.mlflow_client import connect, reaching
from jobs.models import check_registered, locate
from jobs.promote import Wanted, promote_version
from jobs.run import tracking_uri
from pipeline.errors import EnvironmentProblem, UsageError
from tests.jobs.mlflow_seen import default_uri


@pytest.mark.parametrize("words", [["config", "schema"], ["config", "explain", "seed"]], ids=["much", "little"])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(words: list[str]):
    command = [sys.executable, "-m", "jobs.cli", *words]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=os.environ, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_no_reader_that_has_gone(monkeypatch: pytest.MonkeyPatch):
    def breaks(**_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "app", breaks)
    with pytest.raises(BrokenPipeError):
        cli.main()


@pytest.mark.parametrize("below", ["", "runs/deep"])
def test_a_home_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "file" / below))
    with pytest.raises(UsageError, match=f"GRISTMILL_HOME=.*: {tmp_path}/file is a file. Name a folder"):
        home()


@pytest.mark.parametrize("uri", ["foo://bar", "/tmp/mlruns", "file:///tmp/mlruns", "localhost:5000"])
def test_where_no_mlflow_could_be_is_refused_before_a_run(monkeypatch: pytest.MonkeyPatch, uri: str):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UsageError, match=f"tracking URI {uri}: MLflow keeps no runs there"):
        tracking_uri()


@pytest.mark.parametrize(
    "uri", ["http://host:5000", "postgresql+psycopg2://u:p@host/db", "sqlite:///x.db", "databricks"]
)
def test_where_mlflow_may_be_is_taken(monkeypatch: pytest.MonkeyPatch, uri: str):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri() == uri


def test_looking_for_a_model_makes_no_database(tmp_path: Path):
    with pytest.raises(UsageError, match=r"mlflow.db: no such MLflow database, .*gristmill run CONFIG"):
        locate("smoke", tmp_path, default_uri(tmp_path))
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_that_is_away_is_told_with_the_remedy(tmp_path: Path):
    uri = "http://127.0.0.1:9"
    with pytest.raises(EnvironmentProblem) as problem, reaching(uri):
        check_registered(connect(uri), "smoke")
    assert str(problem.value).startswith(f"MLflow at {uri} does not answer. Start it, or say where it is")


@pytest.mark.parametrize("name", ["clf@champion", "models:/clf", "clf/3"])
def test_what_is_promoted_is_named_by_its_name_alone(tmp_path: Path, name: str):
    uri = default_uri(tmp_path)
    connect(uri, create=True)
    with pytest.raises(UsageError, match=f"{name}: give the name alone, clf; --version says which"):
        promote_version(Wanted(name=name), tmp_path, uri)
