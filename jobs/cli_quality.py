"""The commands about how good a model is: evaluate, compare."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter, validators

from jobs.cli_shared import MODELS, Json, Quiet, emit
from pipeline.classes import SEPARATOR

TERMINAL_SECONDS, LOG_SECONDS = 0.2, 10.0
WEAKEST = 5

Model = Annotated[str, Parameter(help="A registered name, NAME@ALIAS, a models:/ URI or an export folder.")]
Data = Annotated[
    Path,
    Parameter(help="Labelled texts: jsonl, csv, tsv or parquet, also .gz or .zst; a file, folder or saved dataset."),
]
MaybeData = Annotated[
    Path | None,
    Parameter(help="Labelled texts. Default: the test split that A was evaluated on, if it is in GRISTMILL_HOME."),
]
Text = Annotated[str, Parameter(help="The column that holds the text.")]
Label = Annotated[str, Parameter(help="The column that holds the class, or the classes.")]
Separator = Annotated[
    str, Parameter(help="What stands between the classes of a text where it may have several, in one string.")
]
Split = Annotated[
    str | None,
    Parameter(
        help="Rows whose column `split` says this or, without one, whose file does, as test.csv beside train.csv; "
        "`all` takes every row. Default: the test rows, or every row where nothing says which those are."
    ),
]
Report = Annotated[
    Path | None, Parameter(help="A folder that gets report.html, its pictures, scores.json and every prediction.")
]
Seed = Annotated[int, Parameter(help="Seed of the resampling.", validator=validators.Number(gte=0))]
Resamples = Annotated[
    int, Parameter(help="Resamples of the bootstrap.", validator=validators.Number(gte=100, lte=1_000_000))
]


def register(app: App) -> None:
    """Give these commands to the app, in the order of the help page."""
    for place, command in enumerate((evaluate, compare)):
        app.command(command, group=MODELS, sort_key=place / 10 - 0.5)  # after predict, before the registry


def evaluate(
    model: Model,
    data: Data,
    *,
    text: Text = "text",
    label: Label = "label",
    split: Split = None,
    separator: Separator = SEPARATOR,
    report: Report = None,
    seed: Seed = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model on labelled texts: accuracy, macro-F1, every class, calibration, with 95 % intervals.

    * `gristmill evaluate quickstart reviews.jsonl`
    * `gristmill evaluate quickstart@champion new.csv --text body --label topic --report report/`
    * `gristmill evaluate runs/store/export/1a2b... data.parquet --split validation --json`

    ECE, log loss and Brier are given twice: as the network gave them, and calibrated, as the model serves them.
    """
    from jobs.assess import evaluate_model
    from jobs.home import home
    from jobs.labelled import Columns
    from jobs.run import tracking_uri

    with Shown(quiet) as shown:
        columns = Columns(text=text, label=label, split=split, separator=separator)
        result = evaluate_model(
            model,
            data,
            home=home(),
            uri=tracking_uri(),
            columns=columns,
            report=report,
            seed=seed,
            on_progress=shown.progress,
        )
    emit(result) if json_ else _print_scores(result)


def compare(
    a: Model,
    b: Model,
    *,
    data: MaybeData = None,
    text: Text = "text",
    label: Label = "label",
    split: Split = None,
    separator: Separator = SEPARATOR,
    resamples: Resamples = 10_000,
    seed: Seed = 0,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say which of two models is better on the same labelled texts, and whether that may be chance.

    * `gristmill compare quickstart@candidate quickstart@champion`
    * `gristmill compare models:/quickstart/3 models:/quickstart/2 --data new.jsonl --json`

    Without `--data` it is on the test split of A, less what either has learned from.

    The difference of macro-F1, A less B, comes with a 95 % interval by paired bootstrap: both models are scored on the
    same resampled texts. Its p-value is twice the smaller share of resamples in which the difference is on one side
    of 0. McNemar's exact test does the same for accuracy, on the texts that only one of them gets right.
    """
    from jobs.assess import compare_models
    from jobs.home import home
    from jobs.labelled import Columns
    from jobs.run import tracking_uri

    with Shown(quiet) as shown:
        result = compare_models(
            a,
            b,
            data,
            home=home(),
            uri=tracking_uri(),
            columns=Columns(text=text, label=label, split=split, separator=separator),
            resamples=resamples,
            seed=seed,
            on_progress=shown.progress,
        )
    emit(result) if json_ else _print_comparison(result)


class Shown:
    """Progress on stderr: one line that changes on a terminal, else a line now and then. A context manager."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._terminal = quiet, sys.stderr.isatty()
        self._last = time.monotonic()

    def progress(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._quiet or now - self._last < (TERMINAL_SECONDS if self._terminal else LOG_SECONDS):
            return
        self._last = now
        line = f"{done:,} of {total:,} {what} ({100 * done // max(total, 1)} %)"
        sys.stderr.write(f"\r\033[K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *error: object) -> None:
        if self._terminal and not self._quiet:
            sys.stderr.write("\r\033[K")


def _print_scores(result: Mapping[str, Any]) -> None:
    blank = f", {result['blank']:,} blank ones left out" if result["blank"] else ""
    sys.stdout.write(f"{result['model']} on {result['n']:,} texts of {result['data']} ({result['split']}{blank})\n\n")
    for name, key in (("accuracy", "accuracy"), ("macro-F1", "macro_f1")):
        low, high = result[f"{key}_ci"]
        sys.stdout.write(f"{name:<10}{result[key]:>8.3f}   {low:.3f} to {high:.3f}\n")
    if "micro_f1" in result:
        sys.stdout.write(f"{'micro-F1':<10}{result['micro_f1']:>8.3f}\n")
    for name, key in (("ECE", "ece"), ("log loss", "log_loss")):
        before = f"   {result[key]:.3f} before calibration" if result["temperature"] != 1 else ""
        sys.stdout.write(f"{name:<10}{result[f'{key}_calibrated']:>8.3f}{before}\n")
    weakest = sorted((row for row in result["per_class"] if row["support"]), key=lambda row: row["f1"])[:WEAKEST]
    sys.stdout.write("\nweakest classes (F1, texts)\n")
    for row in weakest:
        sys.stdout.write(f"{row['f1']:>18.3f}{row['support']:>8,}   {row['name']}\n")
    sys.stdout.write(f"\nIn {result['seconds']:.1f} s, {result['texts_per_second']:,.0f} texts/s.\n")
    if result["report"]:
        sys.stdout.write(f"Report: {result['report']}\n")


def _print_comparison(result: Mapping[str, Any]) -> None:
    left_out = f"; {result['left_out']:,} that A or B has learned from left out" if result["left_out"] else ""
    sys.stdout.write(f"On {result['n']:,} texts of {result['data']} ({result['split']}{left_out}):\n\n")
    sys.stdout.write("    accuracy  macro-F1\n")
    for side in ("a", "b"):
        scores = f"{result[f'accuracy_{side}']:>11.3f}{result[f'macro_f1_{side}']:>10.3f}"
        sys.stdout.write(f"{side.upper()}{scores}   {result[side]}\n")
    sys.stdout.write(f"\n{result['verdict']}\nMcNemar's exact p for accuracy: {result['mcnemar_p']:.3g}\n")
