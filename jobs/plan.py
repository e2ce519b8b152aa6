"""What a run would do, and why, as data and as a table."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.run import open_config
from pipeline.errors import UsageError
from pipeline.runner import plan

MAX_REASONS = 6


def plan_rows(config: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """`[{"name", "key", "status": "built" | "reused", "reasons"}]`, inputs first; no key until its inputs exist."""
    opened = open_config(config, overrides)
    return [
        {"name": p.stage.name, "key": p.key, "status": p.status, "reasons": p.reasons}
        for p in plan(opened.graph.targets, opened.store)
    ]


def find_row(rows: Sequence[Mapping[str, Any]], stage: str) -> Mapping[str, Any]:
    """The row of one stage. Raises UsageError with the names there are."""
    found = next((row for row in rows if row["name"] == stage), None)
    if found is None:
        raise UsageError(f"{stage!r} is no stage of this config; there are {', '.join(row['name'] for row in rows)}")
    return found


def print_plan(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("stage", "", "key", "why"):
        table.add_column(column)
    for row in rows:
        style = "green" if row["status"] == "built" else "cyan"
        reasons = row["reasons"][:MAX_REASONS]
        left_out = len(row["reasons"]) - len(reasons)
        why = "\n".join([*reasons, *([f"and {left_out} more"] if left_out else [])])
        status = "to build" if row["status"] == "built" else "reused"
        table.add_row(row["name"], Text(status, style), (row["key"] or "…")[:8], Text(why))
    Console(file=sys.stdout, highlight=False).print(table)
