"""How good the classifier is on texts that nothing was chosen by, beside what it must beat."""

import csv
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le

from pipeline import baselines, metrics, plots, report
from pipeline.classify import probabilities
from pipeline.engine import pick_device
from pipeline.metrics import Labelling, Scores
from pipeline.report import Picture, Prediction
from pipeline.splitting import LabelledSplit
from pipeline.stage import Context, Resources, Stage
from pipeline.stages.labels import Labels
from pipeline.tables import write_table
from pipeline.weights import ClassifierFiles, LoadedClassifier

N_MISTAKES = 50
N_LATENCY_TEXTS = 20


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on the test texts."""

    bootstrap: Annotated[int, Ge(100), Le(100_000)] = 1000
    """Resamples behind every confidence interval."""
    baseline: bool = True
    """Also measure TF-IDF with logistic regression, which costs seconds and is hard to beat."""
    random_init: bool = False
    """Also fine-tune the same body from random weights: what pretraining was worth."""


@dataclass(frozen=True)
class Evaluation:
    """`scores.json`, the predictions behind it, the pictures and the report."""

    path: Path

    @cached_property
    def scores(self) -> dict[str, Any]:
        """The fields of `metrics.Scores`; and, each a dict or None, `baseline`, `random_init`, `majority`, `scaled`."""
        return json.loads((self.path / "scores.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage[Evaluation]):
    """Measures a classifier on the test split. `random_init` is the same body, fine-tuned from random weights."""

    config: EvaluateConfig
    classifier: Stage[ClassifierFiles]
    labels: Stage[Labels]
    random_init: Stage[ClassifierFiles] | None = None
    seed: int = 0

    @property
    def resources(self) -> Resources:
        return Resources(cpus=0)

    def load(self, path: Path) -> Evaluation:
        return Evaluation(path)

    def run(self, ctx: Context) -> None:
        torch.set_num_threads(ctx.cpus)
        labels, clock = ctx.open(self.labels), Clock()
        test = labels.split("test")
        loaded = _ready(ctx.open(self.classifier))
        with clock.time("classifier"):
            table = _probabilities(ctx, loaded, test.texts)
        scores = metrics.score(test.targets, table, labels.names, resamples=self.config.bootstrap, seed=self.seed)
        ours = Labelling(test.targets, table.argmax(axis=1), len(labels.names))
        record = {
            **scores.to_json(),
            **self._rivals(ctx, labels, ours, clock),
            "scaled": _scaled(ctx, loaded, labels.split("validation"), test.targets, table),
        }
        _write(ctx.out, record, _predictions(test, table, labels.names), _pictures(scores, ours))
        ctx.notes["datasets"] = [ctx.dataset(self.labels, "test")]
        _note(ctx, record, {**_speed(clock, test.texts), "test/latency_seconds": _latency(loaded, test.texts)})

    def _rivals(self, ctx: Context, labels: Labels, ours: Labelling, clock: "Clock") -> dict[str, Any]:
        """What the classifier is compared with, by name: scores and our lead, or None for what was left out."""
        train, validation, test = labels.split("train"), labels.split("validation"), labels.split("test")
        learned_from = np.concatenate([train.targets, validation.targets])
        baseline = random_init = None
        if self.config.baseline:
            with clock.time("baseline"):
                predicted = baselines.tfidf_logreg(train, validation, test.texts)
            baseline = {"name": "tfidf-logreg", **self._compared(ours, predicted)}
        if self.random_init is not None:
            predicted = _probabilities(ctx, _ready(ctx.open(self.random_init)), test.texts).argmax(axis=1)
            random_init = self._compared(ours, predicted)
        majority = self._compared(ours, baselines.majority(learned_from, len(test.texts)))
        return {"baseline": baseline, "random_init": random_init, "majority": majority}

    def _compared(self, ours: Labelling, predicted: np.ndarray) -> dict[str, Any]:
        theirs = Labelling(ours.targets, predicted, ours.n_labels)
        return asdict(metrics.compare(ours, theirs, resamples=self.config.bootstrap, seed=self.seed))


@dataclass(frozen=True)
class Clock:
    """Seconds by what they were spent on."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, what: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - start


def _ready(files: ClassifierFiles) -> LoadedClassifier:
    loaded = files.load()
    loaded.model.to(pick_device("auto"))
    return loaded


def _probabilities(ctx: Context, loaded: LoadedClassifier, texts: list[str]) -> np.ndarray:
    """In float32, as the export computes, so that the scores are of what a user gets."""
    show = partial(ctx.tracker.progress, text="texts classified")
    return probabilities(loaded, texts, precision="fp32", on_progress=show)


def _scaled(
    ctx: Context, loaded: LoadedClassifier, validation: LabelledSplit, targets: np.ndarray, table: np.ndarray
) -> dict[str, float] | None:
    """Calibration on the test texts with the temperature that fits the validation texts; None where there are none."""
    if not validation.texts:
        return None
    t = metrics.temperature(validation.targets, _probabilities(ctx, loaded, validation.texts))
    return {"temperature": t, **metrics.calibration(targets, metrics.with_temperature(table, t))}


def _speed(clock: Clock, texts: list[str]) -> dict[str, float]:
    seconds = {f"{what}/seconds": spent for what, spent in clock.seconds.items() if what == "baseline"}
    return {"test/texts_per_second": len(texts) / clock.seconds["classifier"], **seconds}


def _latency(loaded: LoadedClassifier, texts: list[str]) -> float:
    """Median seconds of classifying one text by itself."""
    clock = Clock()
    for number, text in enumerate(texts[:N_LATENCY_TEXTS]):
        with clock.time(str(number)):
            probabilities(loaded, [text])
    return median(clock.seconds.values())


def _predictions(test: LabelledSplit, table: np.ndarray, names: list[str]) -> list[Prediction]:
    columns = (test.texts, test.targets, table.argmax(axis=1), table.max(axis=1).tolist())
    return [
        Prediction(text, names[label], names[predicted], round(confidence, metrics.DIGITS))
        for text, label, predicted, confidence in zip(*columns, strict=True)
    ]


def _pictures(scores: Scores, ours: Labelling) -> dict[str, Picture]:
    names = [row.name for row in scores.per_class]
    confusion = partial(plots.confusion_matrix, ours.confusion, names)
    reliability = partial(plots.reliability_diagram, scores.bins, scores.ece)
    return {
        "confusion.png": _picture(confusion, "Confusion matrix: which class is taken for which"),
        "reliability.png": _picture(reliability, "Reliability diagram: confidence against accuracy"),
        "per_class.png": _picture(
            partial(plots.class_bars, scores.per_class), "F1 of every class, as in the table below"
        ),
    }


def _picture(draw: Callable[..., bytes], alt: str) -> Picture:
    return Picture(draw(theme=plots.LIGHT), draw(theme=plots.DARK), alt)


def _write(out: Path, record: dict[str, Any], predictions: list[Prediction], pictures: dict[str, Picture]) -> None:
    wrong = (p for p in predictions if p.predicted != p.label)
    mistakes = sorted(wrong, key=lambda p: (-p.confidence, p.text))[:N_MISTAKES]
    (out / "scores.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    columns = [f.name for f in fields(Prediction)]
    write_table(out / "predictions.parquet", {name: [getattr(p, name) for p in predictions] for name in columns})
    with (out / "errors.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *(astuple(mistake) for mistake in mistakes)])
    for name, picture in pictures.items():
        (out / name).write_bytes(picture.light)
    (out / "report.html").write_text(report.render(record, mistakes, list(pictures.values())), encoding="utf-8")


def _note(ctx: Context, record: dict[str, Any], speed: dict[str, float]) -> None:
    """What stands beside the artifact: the numbers by which runs are compared, and how fast it went."""
    whole = {f"test/{name}": record[name] for name in ("accuracy", "macro_f1", "ece", "log_loss", "brier")}
    rivals = {f"{r}/{name}": record[r][name] for r in report.RIVALS if record[r] for name in ("accuracy", "macro_f1")}
    low, high = record["macro_f1_ci"]
    ctx.notes["metrics"] = {**whole, "test/macro_f1_low": low, "test/macro_f1_high": high, **rivals, **speed}
    beside = f", TF-IDF baseline {record['baseline']['macro_f1']:.3f}" if record["baseline"] else ""
    ctx.notes["headline"] = f"test macro-F1 {record['macro_f1']:.3f} ({low:.3f} to {high:.3f}){beside}"
    ctx.notes["files"] = sorted(path.name for path in ctx.out.iterdir() if path.suffix != ".parquet")
