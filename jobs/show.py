"""How runs and jobs are shown to a person, on stdout."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.status import Status

COLOURS = {"succeeded": "green", "running": "cyan", "pending": "cyan", "failed": "red", "lost": "red"}


def runs_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a run or job: what to call it, its state, since when, and where."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "job", "state", "since", "where"):
        table.add_column(column, no_wrap=column != "where", overflow="fold")
    for row in rows:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["started_ms"] / 1000))
        table.add_row(row["run"] or "", row["job_id"] or "", _state(row["state"]), since, row["to"] or "here")
    Console(file=sys.stdout, markup=False, highlight=False).print(table)


def status_lines(seen: Status, to: str | None) -> None:
    """A few lines about one run, and what to do next."""
    console = Console(file=sys.stdout, markup=False, highlight=False)
    lines = {
        "run": seen.run,
        "job": seen.job_id and f"{seen.job_id}{f' at {to}' if to else ''}",
        "state": _state(seen.state),
        "stage": seen.stage and f"{seen.stage}{_progress(seen)}",
        "error": seen.error,
        "next": _next(seen),
    }
    for title, text in lines.items():
        if text:
            console.print(Text.assemble(f"{title:<7}", text), soft_wrap=True)


def _state(state: str) -> Text:
    return Text(state, COLOURS.get(state, "yellow"))


def _progress(seen: Status) -> str:
    if seen.step is None or not seen.steps:
        return ""
    left = "" if seen.eta_seconds is None else f", about {_duration(seen.eta_seconds)} left"
    return f"  {seen.step:,} of {seen.steps:,} ({100 * seen.step // seen.steps} %){left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _next(seen: Status) -> str | None:
    name = seen.run or seen.job_id
    match seen.state:
        case "running" | "pending":
            return f"gristmill logs {name} -f" if seen.job_id else f"gristmill cancel {name}"
        case "succeeded":
            return None
        case "failed":
            return f"gristmill resume {name}, or gristmill run CONFIG if the config was wrong"
        case _:
            return f"gristmill resume {name}"
