"""What the commands have in common: their groups on the help page, options, and how a run is shown."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

RUN = Group.create_ordered("Run a pipeline")
RUNS = Group.create_ordered("Runs and jobs")
MODELS = Group.create_ordered("Use a model")
CONFIG = Group.create_ordered("Configs")

Config = Annotated[Path, Parameter(help="A YAML file: configs/quickstart.yaml is one to begin with.")]
Overrides = Annotated[
    list[str] | None,
    Parameter(name="--set", help="Replace one value: --set pretrain.lr=1e-3. Repeatable.", negative=""),
]
Inline = Annotated[bool, Parameter(help="Run in one process instead of as tasks of Ray, for debugging.", negative="")]
Json = Annotated[
    bool, Parameter(name="--json", help="End with one JSON line on stdout; progress goes to stderr.", negative="")
]
Quiet = Annotated[bool, Parameter(name=["--quiet", "-q"], help="No progress.", negative="")]
NoColor = Annotated[bool, Parameter(name="--no-color", help="No colours.", negative="")]


def emit(value: Any) -> None:
    """One JSON line on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def build(
    config: Path,
    overrides: list[str],
    *,
    inline: bool,
    json_: bool,
    quiet: bool,
    no_color: bool,
    more: dict[str, Any] | None = None,
) -> None:
    """Run a config here and show how it ends; `more` goes into the JSON. Raises what ended it."""
    from jobs import run as runs
    from jobs.console import RunView, print_result
    from jobs.times import process_began
    from jobs.use import can_write
    from pipeline.store import Store

    began = process_began()
    view = RunView(Store(runs.home()), quiet=quiet, no_color=no_color)
    try:
        result = runs.run(config, overrides, inline=inline, view=view, began=began)
    except (Exception, KeyboardInterrupt) as error:
        if json_:
            emit({**runs.failed(error, time.monotonic() - began), **(more or {})})
        raise
    if json_:
        emit({**result, **(more or {})})
    else:
        print_result(result, runs.tracking_uri(), writes=can_write(result["name"]))
