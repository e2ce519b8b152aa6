import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.times import Times, process_began, told
from pipeline.runner import Built, Started
from pipeline.stage import Context, Stage


@dataclass(frozen=True, kw_only=True)
class Toy(Stage[None]):
    def run(self, ctx: Context) -> None: ...
    def load(self, path: Path) -> None: ...


def built(name: str, seconds: float, bare: float, checkpoints: float = 0.0) -> Built:
    notes = {"seconds": bare, "metrics": {"checkpoint_seconds": checkpoints}}
    return Built(Toy(label=name), "k", "built", seconds, "d", notes)


def test_the_parts_add_up_to_the_whole_also_where_stages_overlap(monkeypatch: pytest.MonkeyPatch):
    clock = iter([102.0, 107.0, 110.0, 110.0, 111.0])  # first start; four ends
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    times = Times(began=100.0)
    times.note(Started(Toy(), "k"))
    times.note(built("a", 3.0, 2.5))
    times.note(built("b", 4.0, 4.0, checkpoints=0.25))
    times.note(Built(Toy(label="c"), "k", "reused", 0.1, "d", {"seconds": 50.0}))
    times.note(built("d", 2.0, 1.5))
    parts = times.split(handed_over=112.0, ended=115.0)
    assert parts == {
        "start": 2.0, "between": 3.0, "stages": 7.0, "tracking": 3.0, "artifacts": 1.0, "checkpoints": 0.25
    }  # fmt: skip
    assert "stages 7.0 s" in told(parts)


def test_a_run_that_reuses_everything_has_no_stages():
    times = Times(began=0.0)
    assert times.split(handed_over=1.0, ended=3.0)["stages"] == 0.0


def test_the_time_of_the_imports_counts():
    assert 0 < time.monotonic() - process_began() < 24 * 3600
