"""How good models are on labelled texts: one by itself, or two on the same texts."""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evaluations import learned_from, tested_on
from jobs.labelled import Columns, Labelled, Progress, read_labelled, silent
from jobs.models import locate
from pipeline import assessment, export, metrics
from pipeline.assessment import Answers
from pipeline.bootstrap import Comparison, compare, intervals, mcnemar
from pipeline.classify import probabilities
from pipeline.engine import pick_device
from pipeline.errors import DataError, EnvironmentProblem, UsageError
from pipeline.labelling import Labelling, rounded
from pipeline.store import Store
from pipeline.targets import Probabilities, answered, decode, encode

if TYPE_CHECKING:
    from pipeline.export import Subject

RESAMPLES = 1000
COMPARING = 10_000
"""Resamples of a comparison: enough for a p-value of .001 to be told from one of .002."""

ALONE: dict[str, Any] = {
    "baseline": None,
    "baselines": [],
    "random_init": None,
    "majority": None,
    "seeds": None,
    "contamination": None,
}
"""What a report shows of rivals where there are none."""


@dataclass(frozen=True)
class Model:
    """A classifier that was found, ready to use: as it was named, where it lies, and what it is."""

    name: str
    folder: Path
    subject: "Subject"

    @property
    def labels(self) -> list[str]:
        return self.subject.loaded.labels

    @property
    def multi_label(self) -> bool:
        return self.subject.loaded.multi_label

    def served(self, texts: Sequence[str], on_progress: Progress) -> Probabilities:
        """The probabilities that users get, in float32."""
        show = partial(on_progress, f"texts classified by {self.name}")
        return probabilities(self.subject.loaded, list(texts), precision="fp32", on_progress=show)

    def answers(self, texts: Sequence[str], on_progress: Progress) -> list[Any]:
        """The class that it gives to each text; a list of classes, where it may be several."""
        served = self.served(texts, on_progress)
        return decode(answered(served, multi_label=self.multi_label), self.labels)


def evaluate_model(
    model: str,
    data: Path,
    *,
    home: Path,
    uri: str,
    columns: Columns | None = None,
    report: Path | None = None,
    seed: int = 0,
    on_progress: Progress = silent,
) -> dict[str, Any]:
    """Measure a registered or exported classifier on labelled texts.

    Without a suffix, `ece`, `log_loss` and `brier` are of the probabilities as the network gave them before its
    temperature was folded in; with `_calibrated`, of those that are served. `report` is a folder that gets report.html
    and what an evaluation holds besides. Raises UsageError, and DataError where rows cannot be used.
    """
    start = time.monotonic()
    found = open_model(model, home, uri)
    several = found.multi_label
    read = read_labelled(data, columns or Columns(), on_progress, multi_label=several)
    split = read.known_to(found.labels, model)
    begun = time.monotonic()
    served = found.served(split.texts, on_progress)
    raw = metrics.with_temperature(served, 1 / found.subject.temperature, multi_label=several)
    classifying = time.monotonic() - begun
    answers = Answers.of(found.subject.loaded, split, raw, found.subject.temperature)
    record = assessment.measure(answers, resamples=RESAMPLES, seed=seed) | ALONE
    if report is not None:
        _write_report(report, record, answers, f"{model} on {data.name}")
    return {
        "model": model,
        "data": str(data),
        "split": read.split,
        "blank": read.blank,
        **_summary(record),
        "texts_per_second": round(len(split.texts) / max(classifying, 1e-9), 1),
        "seconds": round(time.monotonic() - start, 2),
        "report": report and str(report / "report.html"),
    }


def _summary(record: dict[str, Any]) -> dict[str, Any]:
    kept = ("n", "accuracy", "accuracy_ci", "macro_f1", "macro_f1_ci", "roc_auc", "average_precision", "temperature")
    of_several = ("multi_label", "micro_f1")
    doubtful = ("ece", "log_loss", "brier")
    return {
        **{name: record[name] for name in kept},
        **{name: record[name] for name in of_several if name in record},
        **{name: record[name] for name in doubtful},
        **{f"{name}_calibrated": record["calibrated"][name] for name in doubtful},
        "per_class": record["per_class"],
        "confusions": record["confusions"],
    }


def compare_models(
    a: str,
    b: str,
    data: Path | None,
    *,
    home: Path,
    uri: str,
    columns: Columns | None = None,
    resamples: int = COMPARING,
    seed: int = 0,
    on_progress: Progress = silent,
) -> dict[str, Any]:
    """Two classifiers on the same labelled texts; without `data`, on the test split that `a` was evaluated on, less
    the `left_out` texts that either has learned from.

    `delta` is the macro-F1 of `a` less that of `b`, `ci` its 95 % interval by paired bootstrap, and `p_value` is
    two-sided: twice the smaller share of the resamples in which the difference is on one side of 0, as
    `bootstrap.Comparison` says. `mcnemar_p` is of McNemar's exact test of the accuracies. Raises UsageError where the
    test split is not in the store or all of it is left out, and DataError where rows cannot be used.
    """
    start = time.monotonic()
    first, second = open_model(a, home, uri), open_model(b, home, uri)
    _check_alike(first, second)
    source = data or _test_texts(first, home)
    read = read_labelled(source, columns or Columns(), on_progress, multi_label=first.multi_label)
    n_found = len(read.texts)
    if data is None:
        read = _new_to((first, second), read, home)
    ours, theirs = _on_common_ground(read, (first, second), on_progress)
    found = compare(ours, theirs, resamples=resamples, seed=seed)
    _, macro_f1_ci = intervals(ours, resamples=resamples, seed=seed)
    return {
        "a": a,
        "b": b,
        "data": str(source),
        "split": read.split,
        "n": len(read.texts),
        "left_out": n_found - len(read.texts),
        "delta": found.lead,
        "ci": list(found.lead_ci),
        "p_value": found.p_value,
        "macro_f1_a": rounded(ours.macro_f1),
        "macro_f1_b": found.macro_f1,
        "macro_f1_ci_a": list(macro_f1_ci),
        "macro_f1_ci_b": list(found.macro_f1_ci),
        "accuracy_a": rounded(ours.accuracy),
        "accuracy_b": found.accuracy,
        "mcnemar_p": mcnemar(ours, theirs),
        **_verdict(a, b, found),
        "seconds": round(time.monotonic() - start, 2),
    }


def _test_texts(model: Model, home: Path) -> Path:
    """Raises UsageError where they are not known."""
    store = _store(home)
    found = tested_on(model.folder, store)
    if found is None:
        raise UsageError(
            f"{model.name}: its test split is not in {store.home}, so there is nothing to compare on. Give labelled "
            "texts: --data FILE"
        )
    return found


def _new_to(models: Sequence[Model], read: Labelled, home: Path) -> Labelled:
    """The texts that no model has learned from. Raises UsageError where there are none."""
    new = read.without({text for model in models for text in learned_from(model.folder, _store(home))})
    if not new.texts:
        raise UsageError(
            f"{' or '.join(model.name for model in models)} has learned from each of the {len(read.texts):,} texts "
            "that the first was tested on. Give labelled texts that are new to both: --data FILE"
        )
    return new


def _store(home: Path) -> Store:
    return Store(home, os.environ.get("GRISTMILL_STORE"))


def _check_alike(first: Model, second: Model) -> None:
    """Raises DataError where one gives a text one class and the other any number: no labels are those of both."""
    if first.multi_label != second.multi_label:
        several, one = (first, second) if first.multi_label else (second, first)
        raise DataError(
            f"{several.name} may give a text several classes, or none, and {one.name} gives it one. Compare models "
            "of one kind, and register another kind under a name of its own"
        )


def _on_common_ground(
    read: Labelled, models: tuple[Model, Model], on_progress: Progress
) -> tuple[Labelling, Labelling]:
    """What each model answers, all classes numbered alike. A class that one of them does not know is refused."""
    for model in models:
        read.known_to(model.labels, model.name)
    names = sorted({name for model in models for name in model.labels})
    targets = encode(read.labels, names, multi_label=read.multi_label)
    ours, theirs = (
        encode(model.answers(read.texts, on_progress), names, multi_label=read.multi_label) for model in models
    )
    return Labelling(targets, ours, len(names)), Labelling(targets, theirs, len(names))


def _verdict(a: str, b: str, found: Comparison) -> dict[str, Any]:
    """`better`: the name of the model with the higher macro-F1, or None; `by_chance`: whether that may be chance."""
    low, high = found.lead_ci
    by_chance = low <= 0 <= high
    if found.lead == 0:
        return {"better": None, "by_chance": True, "verdict": f"{a} and {b} have the same macro-F1."}
    better, other = (a, b) if found.lead > 0 else (b, a)
    how, proof = ("scores higher", "which may be chance") if by_chance else ("is better", "more than chance")
    sentence = (
        f"{better} {how} than {other} by {abs(found.lead):.4f} of macro-F1, {proof} "
        f"(interval of the difference {low:+.4f} to {high:+.4f}, p = {found.p_value:.3g})."
    )
    return {"better": better, "by_chance": by_chance, "verdict": sentence}


def open_model(name: str, home: Path, uri: str) -> Model:
    """A registered or exported classifier where this process computes. Raises UsageError, EnvironmentProblem."""
    folder = locate(name, home, uri)
    subject = export.read(folder)
    subject.loaded.model.to(pick_device("auto"))
    return Model(name, folder, subject)


def _write_report(folder: Path, record: dict[str, Any], answers: Answers, about: str) -> None:
    """Every file appears whole; what else is in the folder stays. Raises EnvironmentProblem where none can."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--report {folder}: this is a file. Name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as scratch:
            assessment.write(Path(scratch), record, answers, about)
            for file in sorted(Path(scratch).iterdir()):
                shutil.move(file, folder / file.name)
    except OSError as error:
        raise EnvironmentProblem(f"--report {folder}: cannot be written: {error.strerror or error}") from error
