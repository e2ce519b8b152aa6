"""A classifier's answers to labelled texts, and all that is measured and shown of them: scores, pictures, page."""

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import curve_plots, curves, metrics, plots, report
from pipeline.bootstrap import RESAMPLES
from pipeline.labelling import Labelling, Probabilities, Targets, rounded
from pipeline.metrics import ClassScore
from pipeline.report import Picture, Prediction
from pipeline.slices import Confidence, Lengths, Slicing, confusions
from pipeline.splitting import LabelledSplit
from pipeline.tables import write_table
from pipeline.tokens import encode_documents
from pipeline.weights import LoadedClassifier
from pipeline.windows import N_SPECIAL

N_MISTAKES = 50


@dataclass(frozen=True)
class Answers:
    """What a classifier says of labelled texts. Row i of `raw` belongs to `texts[i]`, column j to `names[j]`.

    `raw` are the probabilities as the network gives them; those that are served are softmax(log p / temperature).
    `lengths` are in tokens, of which it reads the first `longest`; special tokens are not counted. `n_read` is what it
    reads of each text, in all windows, special tokens and what windows share included.
    """

    texts: list[str]
    targets: Targets
    names: list[str]
    raw: Probabilities
    temperature: float
    lengths: Lengths
    longest: int
    n_read: Lengths

    @classmethod
    def of(cls, loaded: LoadedClassifier, split: LabelledSplit, raw: Probabilities, temperature: float) -> "Answers":
        """The answers of a classifier to a split, whose targets are by its labels."""
        documents = encode_documents(loaded.tokenizer, split.texts)
        windows, seq_len = loaded.windows, loaded.model.cfg.seq_len
        return cls(
            texts=split.texts,
            targets=split.targets,
            names=loaded.labels,
            raw=raw,
            temperature=temperature,
            lengths=np.array([len(ids) - N_SPECIAL for ids in documents], dtype=np.int64),
            longest=windows.longest(seq_len),
            n_read=np.array([sum(map(len, windows.cut(ids, seq_len))) for ids in documents], dtype=np.int64),
        )

    @cached_property
    def served(self) -> Probabilities:
        return metrics.with_temperature(self.raw, self.temperature)

    @cached_property
    def confidence(self) -> Confidence:
        """The probability of the class that is answered, as served."""
        return self.served.max(axis=1)

    @cached_property
    def labelling(self) -> Labelling:
        return Labelling(self.targets, self.raw.argmax(axis=1), len(self.names))

    @cached_property
    def curves(self) -> curves.Curves:
        return curves.one_vs_rest(self.targets, self.served, self.names)

    @property
    def predictions(self) -> list[Prediction]:
        columns = (self.texts, self.targets, self.labelling.predicted, self.confidence)
        return [
            Prediction(text, self.names[label], self.names[predicted], rounded(confidence))
            for text, label, predicted, confidence in zip(*columns, strict=True)
        ]

    def slicing(self, resamples: int, seed: int) -> Slicing:
        return Slicing(self.labelling, self.confidence, resamples, seed)


def measure(answers: Answers, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The fields of `metrics.Scores`; and `thresholds`, `cuts` (of two classes, or None), `slices`, `confusions`."""
    targets, served, names = answers.targets, answers.served, answers.names
    scores = metrics.score(targets, answers.raw, names, t=answers.temperature, resamples=resamples, seed=seed)
    cuts = [asdict(row) for row in curves.cuts(targets, served)] if len(names) == 2 else None
    lengths = answers.slicing(resamples, seed).by_length(answers.lengths, answers.longest)
    pairs = confusions(answers.labelling, answers.confidence, answers.texts, names)
    return {
        **scores.to_json(),
        "thresholds": [asdict(row) for row in curves.thresholds(targets, served)],
        "cuts": cuts and {"positive": names[1], "rows": cuts},
        "slices": {"length": [asdict(part) for part in lengths]},
        "confusions": [asdict(pair) for pair in pairs],
    }


def write(folder: Path, record: dict[str, Any], answers: Answers, about: str = "") -> None:
    """`scores.json`, `predictions.parquet`, `errors.csv`, the pictures and `report.html`.

    `record` is what `measure` gives, with what the report says of rivals; `about` what was measured, in words.
    """
    predictions = answers.predictions
    wrong = (p for p in predictions if p.predicted != p.label)
    mistakes = sorted(wrong, key=lambda p: (-p.confidence, p.text))[:N_MISTAKES]
    (folder / "scores.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _write_predictions(folder / "predictions.parquet", predictions, answers.served)
    with (folder / "errors.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [[m.text, m.label, m.predicted, m.confidence] for m in mistakes]
        csv.writer(file, lineterminator="\n").writerows([["text", "label", "predicted", "confidence"], *rows])
    (folder / "per_class.png").write_bytes(plots.class_bars([ClassScore(**row) for row in record["per_class"]]))
    pictures = draw(answers)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture.light)
    (folder / "report.html").write_text(report.render(record, mistakes, pictures, about), encoding="utf-8")


def _write_predictions(path: Path, predictions: list[Prediction], served: Probabilities) -> None:
    """A row a text. `probabilities` are calibrated, float32, in the order of the classes in scores.json."""
    columns: dict[str, Any] = {
        name: [getattr(p, name) for p in predictions] for name in ("text", "label", "predicted", "confidence")
    }
    flat = pa.array(served.astype(np.float32).ravel())
    offsets = pa.array(np.arange(0, served.size + 1, served.shape[1], dtype=np.int32))
    write_table(path, {**columns, "probabilities": pa.ListArray.from_arrays(offsets, flat)})


def draw(answers: Answers) -> dict[str, Picture]:
    """The pictures of the page, by the names of their files. Curves are left out where only one class occurs."""
    names, drawn = answers.names, answers.curves
    bins = {"uncalibrated": metrics.calibration_bins(answers.targets, answers.raw)}
    if answers.temperature != 1:
        bins["calibrated"] = metrics.calibration_bins(answers.targets, answers.served)
    confident = curves.most_confident(answers.targets, answers.served)
    pictures = {
        "confusion": _both(plots.confusion_matrix, answers.labelling.confusion, names),
        "reliability": _both(plots.reliability_diagram, bins),
        "coverage": _both(curve_plots.coverage_curve, confident),
    }
    if drawn.roc:
        pictures["roc"] = _both(curve_plots.roc_curves, drawn.roc, drawn.macro_roc)
        pictures["precision_recall"] = _both(
            curve_plots.precision_recall_curves, drawn.precision_recall, drawn.macro_precision_recall
        )
    return pictures


def _both(picture: Callable[..., bytes], *what: Any) -> Picture:
    drawing = partial(picture, *what)
    return Picture(drawing(theme=plots.LIGHT), drawing(theme=plots.DARK))
