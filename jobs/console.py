"""What a person sees while a pipeline runs: a line as each stage ends, and live progress of those that run."""

import shlex
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jobs.pace import seconds_left
from jobs.record import without_password
from jobs.times import told
from pipeline.runner import Built, Started
from pipeline.store import Store
from pipeline.tracking import read_progress

PLAIN_SECONDS = 10.0
"""Without a terminal, progress is a line this often."""


class RunView:
    """Shows the events of one run on stderr. A context manager: leaving it stops the live display."""

    def __init__(self, store: Store, *, quiet: bool = False, no_color: bool = False) -> None:
        self._store = store
        self._console = Console(stderr=True, quiet=quiet, no_color=no_color, highlight=False)
        self._running: dict[str, tuple[Started, float]] = {}
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
        self._stop = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        else:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._console.is_terminal:
            self._live.stop()

    def show(self, event: Started | Built) -> None:
        if isinstance(event, Started):
            self._running[event.stage.name] = (event, time.monotonic())
            return
        self._running.pop(event.stage.name, None)
        mark = ("built ", "green") if event.status == "built" else ("reused", "cyan")
        seconds = f"{event.seconds:6.1f} s" if event.status == "built" else " " * 8
        key = (event.key[:8], "dim")
        line = Text.assemble(mark, f" {event.stage.name:<22} {seconds}  ", key, f"  {headline(event.notes)}")
        self._console.print(line, soft_wrap=True)

    def _render(self) -> Group:
        return Group(*(Text(line, style="yellow") for line in self._progress_lines()))

    def _progress_lines(self) -> list[str]:
        return [self._progress_line(event, start) for event, start in list(self._running.values())]

    def _progress_line(self, event: Started, start: float) -> str:
        elapsed = time.monotonic() - start
        line = f"…      {event.stage.name:<22} {elapsed:6.1f} s"
        journal = self._store.journal(event.stage.kind, event.key)
        seen = read_progress(journal)
        if not seen or not seen["total"]:
            return line
        done, total = seen["done"], seen["total"]
        left = seconds_left(journal, done, total, elapsed)
        eta = f"  {left:4.0f} s left" if left else ""
        return f"{line}  {done}/{total} ({100 * done // total} %)  {seen['text']}{eta}"

    def _tick(self) -> None:
        while not self._stop.wait(PLAIN_SECONDS):
            for line in self._progress_lines():
                self._console.print(line, markup=False, soft_wrap=True)


def headline(notes: Mapping[str, Any]) -> str:
    """The one or two numbers of a stage that a person looks for."""
    return str(notes.get("headline", ""))


def result_table(scores: Mapping[str, Any], title: str) -> Table:
    """The scores of a classifier, its rivals on the same split beneath."""
    table = Table(box=None, pad_edge=False)
    for column in (title, "accuracy", "95 % interval", "macro-F1", "ECE, calibrated"):
        table.add_column(column, justify="left" if column == title else "right")
    low, high = scores["accuracy_ci"]
    interval = f"{_f(low)} to {_f(high)}"
    own = (_f(scores["accuracy"]), interval, _f(scores["macro_f1"]), _f(scores["ece_calibrated"]))
    table.add_row("this classifier", *own, style="bold")
    if over := scores["seeds"]:
        n = len(over["accuracy"]["values"])
        table.add_row(f"mean of {n} seeds", _f(over["accuracy"]["mean"]), "", _f(over["macro_f1"]["mean"]))
    for rival in scores["baselines"]:
        table.add_row(rival["name"], _f(rival["accuracy"]), "", _f(rival["macro_f1"]))
    if rival := scores["random_init"]:
        table.add_row("same body, random weights", _f(rival["accuracy"]), "", _f(rival["macro_f1"]))
    return table


def _f(value: float) -> str:
    return f"{value:.3f}"


def print_result(result: Mapping[str, Any], default_uri: str, *, writes: bool) -> None:
    """The end of a run, on stdout: scores of every task, where things are, and what to do next.

    `default_uri` is the tracking store that later commands look into unless they are told another; `writes` tells
    whether the pipeline has a language model for `gristmill generate`.
    """
    console = Console(file=sys.stdout, markup=False, highlight=False)
    tasks = result.get("tasks") or ({"": result} if result.get("accuracy") is not None else {})
    for name, task in tasks.items():
        console.print(Padding(result_table(task, f"{name}, test split" if name else "test split"), (1, 0)))
        _print_places(console, _places(task))
    uri = without_password(result["tracking_uri"])
    _print_places(console, {"tracking": uri})
    _print_places(console, {"time": f"{result['wall_seconds']:.0f} s: {told(result['seconds'])}"})
    console.print("\nNext:")
    there = "" if result["tracking_uri"] == default_uri else f"MLFLOW_TRACKING_URI={shlex.quote(uri)} "
    for command in _next_commands(result["name"], tasks, there, writes=writes):
        console.print(f"  {command}", soft_wrap=True)


def _places(task: Mapping[str, Any]) -> dict[str, str | None]:
    return {
        "registered": task.get("model_uri"),
        "export": task.get("export_dir"),
        "report": f"{task['report_dir']}/report.html",
    }


def _print_places(console: Console, places: Mapping[str, str | None]) -> None:
    for title, place in places.items():
        if place:
            console.print(f"{title:<11}{place}", soft_wrap=True)


def _next_commands(name: str, tasks: Mapping[str, Mapping[str, Any]], there: str, *, writes: bool) -> list[str]:
    """`there` says to those that ask the tracking store which one it is."""
    models = [
        task["model_uri"].split("/")[1] if task.get("model_uri") else task.get("export_dir") for task in tasks.values()
    ]
    predict = [f'{there}gristmill predict {model} "a text to label"' for model in models if model]
    generate = [f'gristmill generate {name} "the beginning of"'] if writes else []
    return [*predict, *generate, f"{there}gristmill ui"]
