"""What a person sees while a pipeline runs: a line as each stage ends, and live progress of those that run."""

import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

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

    def say(self, text: str) -> None:
        self._console.print(text)

    def show(self, event: Started | Built) -> None:
        if isinstance(event, Started):
            self._running[event.stage.name] = (event, time.monotonic())
            return
        self._running.pop(event.stage.name, None)
        mark = "[green]built [/]" if event.status == "built" else "[cyan]reused[/]"
        seconds = f"{event.seconds:6.1f} s" if event.status == "built" else " " * 8
        self._console.print(
            f"{mark} {event.stage.name:<20} {seconds}  [dim]{event.key[:8]}[/]  {headline(event.notes)}"
        )

    def _render(self) -> Group:
        return Group(*(Text(line, style="yellow") for line in self._progress_lines()))

    def _progress_lines(self) -> list[str]:
        return [self._progress_line(event, start) for event, start in list(self._running.values())]

    def _progress_line(self, event: Started, start: float) -> str:
        elapsed = time.monotonic() - start
        line = f"…      {event.stage.name:<20} {elapsed:6.1f} s"
        seen = read_progress(self._store.journal(event.stage.kind, event.key))
        if not seen or not seen["total"]:
            return line
        done, total = seen["done"], seen["total"]
        rate = done / max(elapsed, 1e-9)
        eta = f"  {(total - done) / rate:4.0f} s left" if done and done < total else ""
        return f"{line}  {done}/{total} ({100 * done // total} %)  {seen['text']}{eta}"

    def _tick(self) -> None:
        while not self._stop.wait(PLAIN_SECONDS):
            for line in self._progress_lines():
                self._console.print(line, markup=False)


def headline(notes: Mapping[str, Any]) -> str:
    """The one or two numbers of a stage that a person looks for."""
    return str(notes.get("headline", ""))


def result_table(result: Mapping[str, Any], chance: float | None = None) -> Table:
    """The scores of a run, the cheap baseline beside them."""
    table = Table(title=None, box=None, pad_edge=False)
    for column, justify in (
        ("", "left"),
        ("accuracy", "right"),
        ("95 %", "right"),
        ("macro-F1", "right"),
        ("ECE", "right"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    low, high = result["accuracy_ci"]
    table.add_row(
        "this classifier", _f(result["accuracy"]), f"{_f(low)}–{_f(high)}", _f(result["macro_f1"]), _f(result["ece"])
    )
    rivals = {result["baseline"]["name"]: result["baseline"]} if result["baseline"] else {}
    if result["random_init"]:
        rivals["same body, random weights"] = result["random_init"]
    for name, scores in rivals.items():
        table.add_row(name, _f(scores["accuracy"]), "", _f(scores["macro_f1"]), "")
    return table


def _f(value: float) -> str:
    return f"{value:.3f}".lstrip("0")


def print_result(result: Mapping[str, Any]) -> None:
    """The end of a run, on stdout."""
    console = Console(file=sys.stdout, highlight=False)
    console.print()
    if result.get("accuracy") is not None:
        console.print(result_table(result))
        console.print()
    for title, key in (
        ("registered", "model_uri"),
        ("export", "export_dir"),
        ("report", "report_dir"),
        ("tracking", "tracking_uri"),
    ):
        if result.get(key):
            console.print(f"{title:<11}{result[key]}", soft_wrap=True)
