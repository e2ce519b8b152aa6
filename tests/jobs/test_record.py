"""A run is continued when it did not end well and nobody holds it; the record on disk is whole at any time."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.record import OpenRecord, git_state, is_live, list_records, load, open_record, without_password
from pipeline.errors import UsageError

STAGES = [("corpus", "corpus"), ("pretrain", "pretrain")]


def opened(home: Path, plan: str = "p1") -> OpenRecord:
    return open_record(home, "demo", plan, stages=STAGES, params={"lr": 1e-3})


def test_a_record_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.started("corpus", "k1")
        run.ended("corpus", "k1", "built", 1.5)
        run.finish("succeeded", {"accuracy": 0.5})
    again = load(tmp_path, run.record.run)
    assert again == run.record
    assert again.stage("corpus").status == "built"
    assert again.stage("pretrain").status == "pending"
    assert again.run.startswith("demo-")


def test_a_run_that_ended_well_is_not_continued(tmp_path: Path) -> None:
    with opened(tmp_path) as first:
        first.finish("succeeded")
    with opened(tmp_path) as second:
        assert second.record.run != first.record.run
        assert second.record.attempt == 1


def test_a_failed_run_of_the_same_plan_is_continued_with_what_it_had_built(tmp_path: Path) -> None:
    def fail(first: OpenRecord) -> None:
        with first:
            first.started("corpus", "k1")
            first.ended("corpus", "k1", "built", 1.0)
            first.started("pretrain", "k2")
            raise ZeroDivisionError

    first = opened(tmp_path)
    with pytest.raises(ZeroDivisionError):
        fail(first)
    assert first.record.status == first.record.stage("pretrain").status == "failed"
    with opened(tmp_path) as second:
        assert (second.record.run, second.record.attempt) == (first.record.run, 2)
        assert second.record.stage("pretrain").status == "pending"
        second.started("corpus", "k1")
        second.ended("corpus", "k1", "reused", 0.1)
        assert second.record.stage("corpus").status == "built", "an earlier attempt of this run built it"


def test_another_plan_is_another_run(tmp_path: Path) -> None:
    with opened(tmp_path, "p1") as first:
        first.finish("failed")
    with opened(tmp_path, "p2") as second:
        assert second.record.run != first.record.run


def test_a_run_that_a_live_process_holds_is_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as first, opened(tmp_path) as second:
        assert is_live(tmp_path, first.record.run)
        assert second.record.run != first.record.run
    assert not is_live(tmp_path, first.record.run)


def test_a_run_whose_process_was_killed_is_continued(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from jobs.record import open_record\n"
        f"run = open_record(Path(sys.argv[1]), 'demo', 'p1', stages={STAGES!r}, params={{}})\n"
        "run.started('corpus', 'k1'); print(run.record.run, flush=True); time.sleep(60)"
    )
    victim = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    run = victim.stdout.readline().strip()
    assert is_live(tmp_path, run)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    assert not is_live(tmp_path, run)
    assert load(tmp_path, run).status == "running", "nobody was left to write how it ended"
    with opened(tmp_path) as again:
        assert (again.record.run, again.record.attempt) == (run, 2)
        assert again.record.stage("corpus").status == "pending"


def broken_off(home: Path, error: BaseException) -> OpenRecord:
    run = opened(home)
    run.started("corpus", "k1")
    with pytest.raises(type(error)), run:
        raise error
    return run


def test_an_exception_fails_the_run_and_the_stage_that_was_running(tmp_path: Path) -> None:
    run = broken_off(tmp_path, RuntimeError("broken")).record
    assert load(tmp_path, run.run) == run
    assert (run.status, run.stage("corpus").status) == ("failed", "failed")
    assert not is_live(tmp_path, run.run)


def test_ctrl_c_cancels_a_run(tmp_path: Path) -> None:
    run = broken_off(tmp_path, KeyboardInterrupt()).record
    assert (run.status, run.stage("corpus").status) == ("cancelled", "pending")


def test_finishing_twice_keeps_the_first_time(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.finish("succeeded", {"a": 1})
        first = run.record.finished_ms
        run.finish("succeeded", {"a": 1, "b": 2})
    assert load(tmp_path, run.record.run).finished_ms == first


def test_runs_of_one_second_have_names_of_their_own_in_any_home(tmp_path: Path) -> None:
    homes = [tmp_path / "a", tmp_path / "b"]
    names: list[str] = []
    for home in homes * 3:
        with opened(home) as run:
            run.finish("succeeded")
        names.append(run.record.run)
    assert len(set(names)) == 6
    assert {record.run for home in homes for record in list_records(home)} == set(names)


def test_an_unknown_run_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        run.finish("succeeded")
    with pytest.raises(UsageError, match=f"Nearest: {run.record.run}"):
        load(tmp_path, run.record.run[:-1])
    with pytest.raises(UsageError, match="Nothing has run yet"):
        load(tmp_path / "empty", "demo")


def test_a_pipeline_name_becomes_a_safe_folder_name(tmp_path: Path) -> None:
    with open_record(tmp_path, "../my 'demo'", "p", stages=[], params={}) as run:
        assert run.folder.parent == tmp_path / "records"
        assert "'" not in run.record.run


def test_no_password_is_written_to_the_record(tmp_path: Path) -> None:
    uri = "postgresql://me:hunter2@db:5432/mlflow"
    with open_record(tmp_path, "demo", "p", stages=[], params={}, tracking_uri=uri) as run:
        assert "hunter2" not in (run.folder / "record.json").read_text()
    assert without_password(uri) == "postgresql://me:***@db:5432/mlflow"
    assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"


def test_a_folder_outside_git_has_no_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (None, False)


def test_a_checkout_with_an_edit_is_dirty(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    commit, dirty = git_state(tmp_path)
    assert (len(commit or ""), dirty) == (40, False)
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == (commit, True)


def test_the_record_is_plain_json(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        values = json.loads((run.folder / "record.json").read_text())
    assert values["params"] == {"lr": 1e-3}
    assert [stage["name"] for stage in values["stages"]] == ["corpus", "pretrain"]
