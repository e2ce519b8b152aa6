import os
import subprocess
import sys
from pathlib import Path

from pipeline.tracking import Journal, Recorder, read_journal, read_progress


def points(path: Path) -> list[tuple[int, dict[str, float]]]:
    return [(p.step, p.metrics) for p in read_journal(path)]


def test_what_is_appended_is_read_in_order(tmp_path: Path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append({"loss": 2.0}, step=0)
    journal.append({"loss": 1.0, "lr": 0.1}, step=1)
    journal.close()
    assert points(tmp_path / "j.jsonl") == [(0, {"loss": 2.0}), (1, {"loss": 1.0, "lr": 0.1})]


def test_a_restart_repeats_no_point_and_keeps_the_first(tmp_path: Path):
    for value in (2.0, 3.0):
        journal = Journal(tmp_path / "j.jsonl")
        journal.append({"loss": value}, step=0)
        journal.append({"val": 1.0, "loss": value}, step=0)
        journal.close()
    assert points(tmp_path / "j.jsonl") == [(0, {"loss": 2.0}), (0, {"val": 1.0})]


def test_a_torn_last_line_is_dropped_and_the_next_stands_alone(tmp_path: Path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"step": 0, "timestamp_ms": 1, "metrics": {"a": 1.0}}\n{"step": 1, "time')
    assert points(path) == [(0, {"a": 1.0})]
    journal = Journal(path)
    journal.append({"a": 5.0}, step=1)
    journal.close()
    assert points(path) == [(0, {"a": 1.0}), (1, {"a": 5.0})]


def test_a_killed_writer_loses_no_point(tmp_path: Path):
    code = """
import os, signal, sys
from pathlib import Path
from pipeline.tracking import Journal
journal = Journal(Path(sys.argv[1]))
for step in range(50):
    journal.append({"a": step}, step=step)
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "j.jsonl"
    subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ | {"PYTHONPATH": "."}, check=False)
    assert [step for step, _ in points(path)] == list(range(50))


def test_progress_is_there_while_a_stage_runs_and_gone_after(tmp_path: Path):
    path = tmp_path / "j.jsonl"
    recorder = Recorder(path)
    recorder.progress(3, 10, "loss 2.0")
    seen = read_progress(path)
    assert seen is not None
    assert (seen["done"], seen["total"], seen["text"]) == (3, 10, "loss 2.0")
    recorder.close()
    assert read_progress(path) is None


def test_a_new_attempt_does_not_show_how_far_a_killed_one_was(tmp_path: Path):
    path = tmp_path / "j.jsonl"
    Recorder(path).progress(3, 10, "loss 2.0")
    assert read_progress(path)
    again = Recorder(path)
    assert read_progress(path) is None
    again.close()
