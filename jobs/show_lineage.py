"""A lineage as a person reads it: an indented tree from the model down to the raw data."""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from jobs.lineage import Lineage, Need, Origin

SHORT = 12
"""Digits of a key that are shown: as many as a person needs to find it."""


def print_lineage(found: Lineage) -> None:
    """The tree on stdout, a line an artifact; what is below one that is used twice is shown where it comes first."""
    console = Console(file=sys.stdout, highlight=False)
    console.print(_title(found), soft_wrap=True)
    by_key, shown = {stage.key: stage for stage in found.stages}, set[str]()
    for key in found.roots:
        for line in _lines(by_key, Need(name="", kind="", key=key, digest=""), shown, 1):
            console.print(line, soft_wrap=True)


def _title(found: Lineage) -> str:
    aliases = f" ({', '.join(found.aliases)})" if found.aliases else ""
    what = f"[bold]{escape(found.model)}[/] version {found.version}{aliases}" if found.model else "[bold]run[/]"
    return f"{what}  [dim]{escape(found.url)}[/]" if found.url else what


def _lines(by_key: dict[str, Origin], need: Need, shown: set[str], depth: int) -> Iterator[str]:
    stage, margin = by_key[need.key], "  " * depth
    name = _name(stage, need.name)
    if need.key in shown:
        yield f"{margin}{name}  [dim]as above[/]"
        return
    shown.add(need.key)
    yield f"{margin}{name}  {_told(stage)}"
    for further in stage.needs:
        yield from _lines(by_key, further, shown, depth + 1)
    for source in stage.sources:
        yield f"{margin}  {escape(str(source['uri']))}  [dim]content {_content(source)}[/]"


def _content(source: Mapping[str, Any]) -> str:
    """Of a single file its own digest, which any program can check."""
    files = source.get("files", {})
    return next(iter(files.values())) if len(files) == 1 else source["digest"]


def _name(stage: Origin, called: str) -> str:
    """What the stage above calls it, if that is another name; what it is; its key."""
    called = f"{called}: " if called not in ("", stage.kind, stage.stage) else ""
    return f"{called}[bold]{escape(stage.stage)}[/] {stage.key[:SHORT]}"


def _told(stage: Origin) -> str:
    content = f"content {stage.output_digest[:SHORT]}"
    if stage.run_id is None:
        return f"[dim]{content}[/]  [yellow]no run of this server shows it any more[/]"
    code = f"commit {stage.commit[:SHORT]}{' with changes' * stage.dirty}" if stage.commit else "no commit"
    return f"[dim]{content}  {code}  {escape(stage.url or f'run {stage.run_id}')}[/]"
