import json
from pathlib import Path

from jobs.pace import seconds_left


def test_steps_done_before_a_restart_do_not_count_as_done_since(tmp_path: Path):
    journal = tmp_path / "stage.jsonl"
    journal.write_text("".join(json.dumps({"step": n, "timestamp_ms": 700 * n}) + "\n" for n in range(270, 281)))
    assert seconds_left(journal, done=280, total=4880, elapsed=2.0) == 4600 * 0.7


def test_a_stage_without_a_journal_goes_on_as_it_went_so_far(tmp_path: Path):
    assert seconds_left(tmp_path / "none", done=20, total=100, elapsed=5.0) == 20.0
    assert seconds_left(tmp_path / "none", done=0, total=100, elapsed=5.0) is None
