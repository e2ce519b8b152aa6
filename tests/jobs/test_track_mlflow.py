"""MLflow shows exactly what the record and the journals hold: after any kill, any outage, any number of calls."""

import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.mlflow_client import connect, default_uri
from jobs.record import open_record
from jobs.track_mlflow import Mirror, sync
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.publish import MANIFEST
from pipeline.store import Store
from pipeline.tracking import Journal, read_journal
from tests.jobs.conftest import Corpus, Export, Pretrain, Run, toy_pipeline


def toy_with_export(*, seed: int = 0, labels: tuple[str, ...] = ("",)) -> list[Any]:
    base = Pretrain(corpus=Corpus())
    return [Export(base=base, seed=seed, label=label) for label in labels]


def everything_in(home: Path) -> dict[str, Any]:
    return everything_in_store(default_uri(home))


def everything_in_store(uri: str) -> dict[str, Any]:
    """What a tracker holds, without the ids it made up: equal for two trackers that show the same."""
    client = connect(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = sorted(client.search_runs(experiments), key=lambda run: run.info.run_name)
    models = client.search_logged_models(experiments)
    return {
        "runs": [_shown(client, client.get_run(run.info.run_id)) for run in runs],
        "models": sorted((m.name, m.model_type, str(m.status), m.tags["gristmill.key"]) for m in models),
        "versions": sorted((v.name, v.version, v.tags["gristmill.key"]) for v in client.search_model_versions()),
        "aliases": {m.name: m.aliases for m in client.search_registered_models()},
    }


def _shown(client: Any, run: Any) -> dict[str, Any]:
    ours = {n: v for n, v in run.data.tags.items() if n.startswith("gristmill") and "reused_from" not in n}
    history = {name: points(client, run.info.run_id, name) for name in run.data.metrics}
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "tags": ours,
        "params": run.data.params,
        "points": history,
        "datasets": [(d.dataset.name, d.dataset.digest, d.tags[0].value) for d in run.inputs.dataset_inputs],
        "models": (len(run.inputs.model_inputs), len(run.outputs.model_outputs)),
        "files": [file.path for file in client.list_artifacts(run.info.run_id)],
    }


def points(client: Any, run_id: str, name: str) -> list[tuple[int, int, float]]:
    return sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, name))


def journal_points(home: Path, kind: str, key: str, name: str) -> list[tuple[int, int, float]]:
    journal = read_journal(Store(home).journal(kind, key))
    return sorted((p.step, p.timestamp_ms, p.metrics[name]) for p in journal if name in p.metrics)


def child_named(home: Path, name: str) -> dict[str, Any]:
    (found,) = [run for run in everything_in(home)["runs"] if run["name"] == name]
    return found


def test_a_finished_run_is_shown_whole(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy()
    mirrored = sync(home, record.run, uri)
    assert mirrored.url is None, "no server serves this store"

    parent = child_named(home, record.run)
    assert parent["status"] == "FINISHED"
    assert parent["params"] == {"pretrain.steps": "40", "lr": "0.0003"}
    assert parent["points"]["accuracy"][0][2] == 0.9

    corpus, pretrain = child_named(home, "1-corpus"), child_named(home, "2-pretrain")
    assert corpus["datasets"] == [("toy", "d" * 36, "training")]
    for name in ("train/loss", "train/lr"):
        assert pretrain["points"][name] == journal_points(home, "pretrain", str(record.stage("pretrain").key), name)
    assert pretrain["points"]["val/loss"][0][2] == 1.5
    assert pretrain["files"] == ["plots"]
    assert pretrain["models"] == (0, 1)


def test_the_experiment_opens_in_the_view_for_model_training(home: Path, uri: str, run_toy: Run) -> None:
    sync(home, run_toy().run, uri)
    experiment = connect(uri).get_experiment_by_name("toy")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert experiment.artifact_location == (home / "mlartifacts" / "toy").as_uri()


def test_syncing_again_changes_nothing_with_or_without_the_local_state(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy(toy_with_export(), register_name="toy")
    first = sync(home, record.run, uri)
    before = everything_in(home)
    assert sync(home, record.run, uri) == first
    (home / "records" / record.run / "mirror.json").unlink()
    assert sync(home, record.run, uri) == first
    assert everything_in(home) == before


def test_points_appear_while_a_stage_runs_and_none_is_doubled_by_a_lost_state(home: Path, uri: str) -> None:
    with open_record(home, "toy", "p", stages=[("pretrain", "pretrain")], params={}) as opened:
        opened.started("pretrain", "k1")
        journal = Journal(Store(home).journal("pretrain", "k1"))
        for step in range(5):
            journal.append({"loss": float(step)}, step=step)
        sync(home, opened.record.run, uri)
        assert child_named(home, "1-pretrain")["status"] == "RUNNING"
        for step in range(5, 8):
            journal.append({"loss": float(step)}, step=step)
        (opened.folder / "mirror.json").unlink()
        sync(home, opened.record.run, uri)
        journal.close()
        assert child_named(home, "1-pretrain")["points"]["loss"] == journal_points(home, "pretrain", "k1", "loss")
        assert child_named(home, opened.record.run)["status"] == "RUNNING"


def test_a_torn_journal_line_waits_until_it_is_whole(home: Path, uri: str) -> None:
    with open_record(home, "toy", "p", stages=[("pretrain", "pretrain")], params={}) as opened:
        opened.started("pretrain", "k1")
        path = Store(home).journal("pretrain", "k1")
        path.parent.mkdir(parents=True)
        line = '{"step": 1, "timestamp_ms": 1000, "metrics": {"loss": 0.5}}\n'
        path.write_text(line[:20])
        sync(home, opened.record.run, uri)
        path.write_text(line)
        sync(home, opened.record.run, uri)
    assert child_named(home, "1-pretrain")["points"] == {"loss": [(1, 1000, 0.5)]}


def test_a_long_journal_is_sent_in_parts(home: Path, uri: str) -> None:
    with open_record(home, "toy", "p", stages=[("pretrain", "pretrain")], params={}) as opened:
        opened.started("pretrain", "k1")
        journal = Journal(Store(home).journal("pretrain", "k1"))
        for step in range(1100):
            journal.append({"a": float(step), "b": 0.0}, step=step)
        journal.close()
        sync(home, opened.record.run, uri)
    assert child_named(home, "1-pretrain")["points"]["a"] == journal_points(home, "pretrain", "k1", "a")


def test_a_run_that_failed_and_went_on_is_one_run(home: Path, uri: str, run_toy: Run) -> None:
    with pytest.raises(RuntimeError, match="a toy that breaks"):
        run_toy(toy_pipeline(breaks_at=10))
    (run,) = [folder.name for folder in (home / "records").iterdir()]
    sync(home, run, uri)
    assert child_named(home, run)["status"] == "FAILED"
    assert child_named(home, "2-pretrain")["status"] == "FAILED"

    record = run_toy()
    assert (record.run, record.attempt) == (run, 2)
    sync(home, run, uri)
    shown = everything_in(home)["runs"]
    assert [(r["name"], r["status"]) for r in shown] == [
        ("1-corpus", "FINISHED"),
        ("2-pretrain", "FINISHED"),
        (run, "FINISHED"),
    ]
    key = str(record.stage("pretrain").key)
    assert shown[1]["points"]["train/loss"] == journal_points(home, "pretrain", key, "train/loss")
    assert len(shown[1]["points"]["train/loss"]) == 40


def test_a_run_that_was_killed_is_shown_as_killed(home: Path, uri: str) -> None:
    opened = open_record(home, "toy", "p", stages=[("pretrain", "pretrain")], params={})
    opened.started("pretrain", "k1")
    sync(home, opened.record.run, uri)
    opened.release()  # as the kernel does for a dead process
    sync(home, opened.record.run, uri)
    assert {run["status"] for run in everything_in(home)["runs"]} == {"KILLED"}


def test_a_reused_stage_points_to_the_run_that_made_it(home: Path, uri: str, run_toy: Run) -> None:
    first = run_toy()
    sync(home, first.run, uri)
    second = run_toy(plan="another")
    assert {stage.status for stage in second.stages} == {"reused"}
    sync(home, second.run, uri)

    client = connect(uri)
    experiment = client.get_experiment_by_name("toy").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert sorted(runs) == sorted(["1-corpus", "2-pretrain", first.run, second.run])
    tags = runs[second.run].data.tags
    assert tags["gristmill.reused_from.pretrain"] == runs["2-pretrain"].info.run_id


def test_a_reused_stage_that_no_run_shows_is_shown_by_the_first_that_needs_it(
    home: Path, uri: str, run_toy: Run
) -> None:
    run_toy()  # never mirrored
    second = run_toy(plan="another")
    sync(home, second.run, uri)
    assert len(child_named(home, "2-pretrain")["points"]["train/loss"]) == 40


def test_a_stage_that_is_only_being_checked_gets_no_run(home: Path, uri: str, run_toy: Run) -> None:
    first = run_toy()
    sync(home, first.run, uri)
    stages = [(stage.name, stage.kind) for stage in first.stages]
    with open_record(home, "toy", "another", stages=stages, params={}) as opened:
        opened.started("corpus", str(first.stage("corpus").key))
        sync(home, opened.record.run, uri)
    assert len(everything_in(home)["runs"]) == 4, "the first run's three, and the new parent"


def test_models_link_the_chain(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy(toy_with_export())
    sync(home, record.run, uri)
    shown = everything_in(home)
    assert [model[:3] for model in shown["models"]] == [
        ("export", "classifier", "READY"),
        ("pretrain", "base", "READY"),
    ]
    assert child_named(home, "3-export")["models"] == (1, 1)
    (base,) = [model for model in connect(uri).search_logged_models(["1"]) if model.model_type == "base"]
    manifest = Store(home).find("pretrain", str(record.stage("pretrain").key))
    assert base.tags["gristmill.digest"] == manifest.digest
    assert not list((home / "mlartifacts").rglob(f"{base.model_id}/artifacts/*")), "big files are not copied"


def test_one_version_for_each_export_and_the_newest_run_proposes_its_own(home: Path, uri: str, run_toy: Run) -> None:
    first = sync(home, run_toy(toy_with_export(), "p1", "clf").run, uri)
    second_run = run_toy(toy_with_export(seed=1), "p2", "clf").run
    second = sync(home, second_run, uri)
    assert (first.model_uri, second.model_uri) == ("models:/clf/1", "models:/clf/2")
    again = run_toy(toy_with_export(), "p3", "clf").run
    third = sync(home, again, uri)
    assert third.model_version == "1", "the same export is the same version"
    client = connect(uri)
    assert str(client.get_model_version_by_alias("clf", "candidate").version) == "1"
    sync(home, second_run, uri)
    assert str(client.get_model_version_by_alias("clf", "candidate").version) == "1", "an old run takes no alias back"


def test_a_version_tells_where_it_comes_from(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy(toy_with_export(), register_name="clf")
    sync(home, record.run, uri)
    client = connect(uri)
    version = client.get_model_version("clf", "1")
    corpus = Store(home).find("corpus", str(record.stage("corpus").key))
    assert version.tags["gristmill.corpus.digest"] == corpus.digest
    assert version.tags["gristmill.pretrain.key"] == record.stage("pretrain").key
    for stage in record.stages:
        assert f"| {stage.kind} | `{stage.key}` |" in version.description
    maker = client.get_run(version.run_id)
    assert maker.info.run_name == "3-export"
    model = client.get_logged_model(maker.outputs.model_outputs[0].model_id)
    assert '"clf"' in model.tags["mlflow.modelVersions"]


def test_each_task_of_a_pipeline_has_a_name_of_its_own(home: Path, uri: str, run_toy: Run) -> None:
    targets = [
        Export(base=Pretrain(corpus=Corpus()), seed=seed, label=label) for seed, label in enumerate(("tone", "topic"))
    ]
    sync(home, run_toy(targets, register_name="clf").run, uri)
    assert sorted(everything_in(home)["aliases"]) == ["clf-tone", "clf-topic"]


def test_a_deleted_artifact_stops_nothing(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy()
    shutil.rmtree(Store(home).path("pretrain", str(record.stage("pretrain").key)))
    sync(home, record.run, uri)
    assert len(child_named(home, "2-pretrain")["points"]["train/loss"]) == 40


def test_a_run_that_a_slow_server_made_twice_is_one_run_again(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy()
    first = sync(home, record.run, uri)
    client = connect(uri)
    for run in client.search_runs([first.experiment_id]):
        kept = {name: tag for name, tag in run.data.tags.items() if name.startswith("gristmill")}
        client.create_run(first.experiment_id, run.info.start_time + 1, kept, "double")
    assert sync(home, record.run, uri) == first
    assert len(client.search_runs([first.experiment_id])) == 3


def test_an_unknown_run_is_refused(home: Path, uri: str) -> None:
    with pytest.raises(UsageError, match="no run 'nobody'"):
        sync(home, "nobody", uri)


FIRST_NEW_ROW_IN = (
    *(
        "experiments",
        "runs",
        "params",
        "tags",
        "runs",
        "metrics",
        "inputs",
        "runs",
        "metrics",
        "logged_models",
        "inputs",
    ),
    *("runs", "inputs", "logged_models", "inputs", "registered_models", "model_versions", "registered_model_aliases"),
)
"""Where one sync after another is killed, in the order in which a sync first writes to these tables."""
VICTIM = """
import os, signal, sys
from pathlib import Path
import mlflow.pyfunc, sqlalchemy
import jobs.mlflow_registry, jobs.mlflow_stages
from jobs.track_mlflow import sync

def die_after_a_row_in(table):
    state = {"written": False, "committed": False}
    def on_statement(connection, cursor, statement, *rest):
        if state["committed"]:
            os.kill(os.getpid(), signal.SIGKILL)
        state["written"] |= statement.startswith(f"INSERT INTO {table} ")
    def on_commit(connection):
        state["committed"] = state["written"]
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", on_statement)
    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "commit", on_commit)

home, run, uri, *tables = sys.argv[1:]
for table in tables:
    child = os.fork()
    if child == 0:
        die_after_a_row_in(table)
        sync(Path(home), run, uri)
        os._exit(0)
    print(table, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_a_sync_that_is_killed_after_any_new_row_is_made_good_by_the_next(
    home: Path, uri: str, run_toy: Run, database: Path
) -> None:
    record = run_toy([Export(base=Pretrain(corpus=Corpus(), steps=1100))], register_name="clf")
    command = [sys.executable, "-c", VICTIM, str(home), record.run, uri, *FIRST_NEW_ROW_IN]
    victim = subprocess.run(command, capture_output=True, text=True, check=True)
    assert victim.stdout.splitlines() == [f"{table} {-signal.SIGKILL}" for table in FIRST_NEW_ROW_IN], victim.stderr
    sync(home, record.run, uri)
    survived = everything_in(home)
    assert [run["status"] for run in survived["runs"]] == ["FINISHED"] * 4

    shutil.copy(database, home / "untouched.db")
    untouched = f"sqlite:///{home}/untouched.db"
    sync(home, record.run, untouched)
    assert everything_in_store(untouched) == survived


@pytest.fixture
def refusing_uri() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def hanging_uri() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Broken(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500, "broken")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        del args


@pytest.fixture
def broken_uri() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["refusing_uri", "hanging_uri", "broken_uri"])
def test_a_dead_server_neither_delays_nor_breaks_a_run_and_is_named_once(
    kind: str, request: pytest.FixtureRequest, home: Path, run_toy: Run, caplog: pytest.LogCaptureFixture
) -> None:
    record, dead = run_toy(), request.getfixturevalue(kind)
    mirror = Mirror(home, record.run, dead)
    mirror.INTERVAL_SECONDS = 0.05
    with caplog.at_level(logging.WARNING, "gristmill"):
        began = time.monotonic()
        mirror.start()
        assert time.monotonic() - began < 0.5
        time.sleep(0.5)
        assert mirror.finish(1.5) is None
        assert time.monotonic() - began < 4
    (warning,) = caplog.messages
    assert "80 points kept in" in warning
    assert f"gristmill sync {record.run}" in warning


def test_what_a_dead_server_missed_is_all_there_later(home: Path, uri: str, refusing_uri: str, run_toy: Run) -> None:
    record = run_toy()
    Mirror(home, record.run, refusing_uri).start().finish(10)
    sync(home, record.run, uri)
    key = str(record.stage("pretrain").key)
    shown = child_named(home, "2-pretrain")["points"]["train/loss"]
    assert shown == journal_points(home, "pretrain", key, "train/loss")


def test_a_server_that_refuses_is_an_environment_problem(home: Path, refusing_uri: str, run_toy: Run) -> None:
    with pytest.raises(EnvironmentProblem, match="MLflow at http://127"):
        sync(home, run_toy().run, refusing_uri)


def test_the_mirror_follows_a_run_and_its_last_sync_has_everything(home: Path, uri: str) -> None:
    stages = [("pretrain", "pretrain")]
    with open_record(home, "toy", "p", stages=stages, params={}) as opened:
        mirror = Mirror(home, opened.record.run, uri)
        mirror.INTERVAL_SECONDS, mirror.REST_PER_WORK = 0.05, 0
        mirror.start()
        opened.started("pretrain", "k1")
        journal = Journal(Store(home).journal("pretrain", "k1"))
        for step in range(30):
            journal.append({"loss": 1.0}, step=step)
            time.sleep(0.02)
        journal.close()
        opened.ended("pretrain", "k1", "built", 0.6)
        opened.finish("succeeded")
        mirrored = mirror.finish(30)
    assert mirrored is not None
    assert child_named(home, opened.record.run)["status"] == "FINISHED"
    assert child_named(home, "1-pretrain")["points"]["loss"] == journal_points(home, "pretrain", "k1", "loss")


def test_the_tracker_is_not_imported_before_it_is_needed() -> None:
    script = "import sys, jobs.track_mlflow, jobs.models, jobs.ui, jobs.record; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_summary_keeps_its_time_however_often_it_is_sent(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy()
    sync(home, record.run, uri)
    ((_, stamp, _),) = child_named(home, "2-pretrain")["points"]["val/loss"]
    manifest = Store(home).path("pretrain", str(record.stage("pretrain").key)) / MANIFEST
    assert stamp == manifest.stat().st_mtime_ns // 1_000_000
