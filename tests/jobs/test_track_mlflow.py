"""MLflow shows exactly what the record and the journals hold: after any kill, any outage, any number of calls."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cost import cost
from jobs.lineage import lineage
from jobs.mlflow_client import connect
from jobs.record import open_record
from jobs.track_mlflow import Mirror, sync
from pipeline.errors import Preempted, UsageError
from pipeline.publish import MANIFEST
from pipeline.store import Store
from pipeline.tracking import Journal, read_journal, system_path
from tests.jobs.conftest import Run, toy_pipeline
from tests.jobs.mlflow_seen import child_named, everything_in, journal_points, toy_with_export


def test_a_finished_run_is_shown_whole(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy()
    sync(home, record.run, uri)

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


def test_a_journal_that_another_one_has_replaced_is_sent_from_its_beginning(home: Path, uri: str) -> None:
    with open_record(home, "toy", "p", stages=[("pretrain", "pretrain")], params={}) as opened:
        opened.started("pretrain", "k1")
        path = Store(home).journal("pretrain", "k1")
        path.parent.mkdir(parents=True)
        path.write_text('{"step": 1, "timestamp_ms": 1000, "metrics": {"loss": 0.5}}\n')
        sync(home, opened.record.run, uri)
        lines = [f'{{"step": {step}, "timestamp_ms": 1000, "metrics": {{"loss": 0.53125}}}}\n' for step in (1, 2)]
        path.write_text("".join(lines))
        sync(home, opened.record.run, uri)
    assert (2, 1000, 0.53125) in child_named(home, "1-pretrain")["points"]["loss"]


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


@pytest.mark.parametrize("ended", [KeyboardInterrupt, Preempted, RuntimeError])
@pytest.mark.parametrize("seen_before", [True, False])
def test_a_run_that_was_broken_off_shows_its_last_points(
    home: Path, uri: str, ended: type[BaseException], seen_before: bool
) -> None:
    stages = [("pretrain", "pretrain"), ("export", "export")]
    opened = open_record(home, "toy", "p", stages=stages, params={})

    def work() -> None:
        with opened:
            opened.started("pretrain", "k1")
            journal = Journal(Store(home).journal("pretrain", "k1"))
            journal.append({"loss": 2.0}, step=0)
            if seen_before:
                sync(home, opened.record.run, uri)
            journal.append({"loss": 1.0}, step=1)
            journal.close()
            opened.started("export", "k2")
            raise ended

    with pytest.raises(ended):
        work()
    sync(home, opened.record.run, uri)
    shown = child_named(home, "1-pretrain")
    assert shown["points"]["loss"] == journal_points(home, "pretrain", "k1", "loss")
    assert len(shown["points"]["loss"]) == 2
    assert shown["status"] == ("FAILED" if ended is RuntimeError else "KILLED")


@pytest.mark.parametrize("status", ["FINISHED", "KILLED", "RUNNING"])
def test_a_run_that_only_names_an_artifact_is_not_taken_for_the_one_that_made_it(
    home: Path, uri: str, run_toy: Run, status: str
) -> None:
    unseen, client = run_toy(), connect(uri)
    tags = {"gristmill.key": str(unseen.stage("pretrain").key), "gristmill.run": "a-dead-one"}
    other = client.create_run(client.create_experiment("toy", home.as_uri()), tags=tags)
    client.update_run(other.info.run_id, status)
    sync(home, run_toy(toy_with_export(), "another", "clf").run, uri)
    assert [stage.stage for stage in lineage("clf", uri).stages] == ["export", "pretrain", "corpus"]


def test_a_stage_that_two_live_runs_need_is_shown_by_one(home: Path, uri: str) -> None:
    stages = [("pretrain", "pretrain")]
    first, second = (open_record(home, "toy", plan, stages=stages, params={}) for plan in ("one", "another"))
    with first, second:
        for opened in (first, second):
            opened.started("pretrain", "k1")
            sync(home, opened.record.run, uri)
        assert child_named(home, "1-pretrain")["tags"]["gristmill.run"] == first.record.run


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


def test_a_run_says_what_code_made_it_where_and_at_what_cost(
    home: Path, uri: str, run_toy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"COMMIT": "c" * 40, "DIRTY": "1", "IMAGE": "registry/gristmill@sha256:1", "JOB_ID": "nightly"}
    for name, value in given.items():
        monkeypatch.setenv(f"GRISTMILL_{name}", value)
    record = run_toy()
    sync(home, record.run, uri)
    runs = {run.info.run_name: run for run in connect(uri).search_runs(["1"])}
    for run in (runs[record.run], runs["2-pretrain"]):
        shown = {name: run.data.tags.get(name) for name in ("commit", "dirty", "gristmill.image")}
        assert shown == {"commit": "c" * 40, "dirty": "True", "gristmill.image": given["IMAGE"]}
        assert (run.data.tags["gristmill.attempt"], run.data.tags["gristmill.ray_job_id"]) == ("1", "nightly")
    assert runs["2-pretrain"].data.params == {"steps": "40", "version": "1"}
    metrics = runs[record.run].data.metrics
    seconds = sum(stage.seconds for stage in record.stages)
    assert metrics["cost/cpu_hours"] == pytest.approx(2 * seconds / 3600)
    assert "cost/gpu_hours" not in metrics
    assert metrics["wall_seconds"] >= 0


def test_gpus_are_counted_by_what_was_seen_while_a_stage_trained(home: Path, run_toy: Run) -> None:
    record = run_toy()
    stage = record.stage("pretrain")
    samples = Journal(system_path(Store(home).journal("pretrain", str(stage.key))))
    samples.append({"system/gpu_0_memory_usage_megabytes": 1.0, "system/ranks": 4}, step=1000)
    samples.close()
    assert cost(record, Store(home))["cost/gpu_hours"] == pytest.approx(4 * stage.seconds / 3600)


def test_stages_that_are_built_beside_each_other_hold_the_same_cores(home: Path, run_toy: Run) -> None:
    record = run_toy()
    first, second = (replace(stage, status="built", started_ms=0) for stage in record.stages)
    beside = [replace(first, finished_ms=40_000, seconds=36.0), replace(second, finished_ms=30_000, seconds=18.0)]
    assert cost(replace(record, cpus=4, stages=beside), Store(home)) == {"cost/cpu_hours": pytest.approx(4 * 36 / 3600)}


def test_what_the_machine_did_is_shown_with_the_stage_that_trained(home: Path, uri: str, run_toy: Run) -> None:
    record = run_toy()
    sync(home, record.run, uri)
    shown = child_named(home, "2-pretrain")["points"]
    key = str(record.stage("pretrain").key)
    samples = list(read_journal(system_path(Store(home).journal("pretrain", key))))
    assert [point.step for point in samples] == [0]
    for name, value in samples[0].metrics.items():
        assert shown[name] == [(0, samples[0].timestamp_ms, value)]
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= set(shown)
    assert not [name for name in child_named(home, "1-corpus")["points"] if name.startswith("system/")]


def test_the_parent_has_the_scores_and_the_report_of_every_task(home: Path, uri: str) -> None:
    reports = [home / "reports" / name for name in ("tone", "topic")]
    for report in reports:
        report.mkdir(parents=True)
        (report / "report.html").write_text("a page")
    tasks = {report.name: {"macro_f1": 0.8, "seeds": None, "report_dir": str(report)} for report in reports}
    with open_record(home, "toy", "p", stages=[], params={}) as opened:
        opened.finish("succeeded", {"tasks": tasks})
    sync(home, opened.record.run, uri)
    parent = child_named(home, opened.record.run)
    assert [parent["points"][f"{name}/macro_f1"][0][2] for name in tasks] == [0.8, 0.8]
    assert parent["files"] == ["tone", "topic"]


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


def test_the_mirror_rests_longer_the_longer_a_sync_takes_and_a_run_goes(home: Path, uri: str) -> None:
    mirror = Mirror(home, "toy-1", uri)
    assert mirror.rest_seconds(0.01, age_seconds=10) == 2.0
    assert mirror.rest_seconds(0.5, age_seconds=10) == 10.0
    assert mirror.rest_seconds(0.01, age_seconds=1800) == 18.0
    assert mirror.rest_seconds(0.01, age_seconds=10**6) == 60.0


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
