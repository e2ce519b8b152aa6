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
from pipeline.labelling import Labelling, rounded
from pipeline.metrics import ClassScore
from pipeline.report import Picture, Prediction
from pipeline.slices import Confidence, Lengths, Slicing, confusions
from pipeline.splitting import LabelledSplit
from pipeline.tables import lists_of_texts, write_table
from pipeline.targets import Probabilities, Targets, confidence, decode, is_multi_label, shown
from pipeline.tokens import encode_documents
from pipeline.weights import LoadedClassifier
from pipeline.windows import N_SPECIAL

N_MISTAKES = 50


@dataclass(frozen=True)
class Answers:
    """What a classifier says of labelled texts. Row i of `raw` belongs to `texts[i]`, column j to `names[j]`.

    `raw` are the probabilities as the network gives them; those that are served are softmax(log p / temperature), or
    that of each class against its absence where a text may have several.
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

    @property
    def multi_label(self) -> bool:
        """Whether a text may have several classes, or none."""
        return is_multi_label(self.targets)

    @cached_property
    def served(self) -> Probabilities:
        return metrics.with_temperature(self.raw, self.temperature, multi_label=self.multi_label)

    @cached_property
    def confidence(self) -> Confidence:
        """The probability of what is answered, as served."""
        return confidence(self.served, multi_label=self.multi_label)

    @cached_property
    def labelling(self) -> Labelling:
        return Labelling.of_probabilities(self.targets, self.raw)

    @property
    def labels(self) -> list[Any]:
        """The name of each text's class, or a list of names."""
        return decode(self.targets, self.names)

    @cached_property
    def curves(self) -> curves.Curves:
        return curves.one_vs_rest(self.targets, self.served, self.names)

    @property
    def predictions(self) -> list[Prediction]:
        predicted = decode(self.labelling.predicted, self.names)
        columns = (self.texts, self.labels, predicted, map(rounded, self.confidence))
        return [Prediction(*row) for row in zip(*columns, strict=True)]

    def slicing(self, resamples: int, seed: int) -> Slicing:
        return Slicing(self.labelling, self.confidence, resamples, seed)


def measure(answers: Answers, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """The fields of `metrics.Scores`; and `thresholds`, `cuts` (of two classes, or None), `slices`, `confusions`.

    Where a text may have several classes, `multi_label` is True, there is `micro_f1`, and `confusions` is None.
    """
    targets, served, names = answers.targets, answers.served, answers.names
    scores = metrics.score(targets, answers.raw, names, t=answers.temperature, resamples=resamples, seed=seed)
    lengths = answers.slicing(resamples, seed).by_length(answers.lengths, answers.longest)
    return {
        **scores.to_json(),
        **({"multi_label": True, "micro_f1": rounded(answers.labelling.micro_f1)} if answers.multi_label else {}),
        "thresholds": [asdict(row) for row in curves.thresholds(targets, served)],
        "cuts": _cuts(answers),
        "slices": {"length": [asdict(part) for part in lengths]},
        "confusions": _confusions(answers),
    }


def _cuts(answers: Answers) -> dict[str, Any] | None:
    if answers.multi_label or len(answers.names) != 2:
        return None
    rows = curves.cuts(answers.targets, answers.served)
    return {"positive": answers.names[1], "rows": [asdict(row) for row in rows]}


def _confusions(answers: Answers) -> list[dict[str, Any]] | None:
    """Where a text may have several classes, none is taken for another."""
    if answers.multi_label:
        return None
    pairs = confusions(answers.labelling, answers.confidence, answers.texts, answers.names)
    return [asdict(pair) for pair in pairs]


def write(folder: Path, record: dict[str, Any], answers: Answers, about: str = "") -> None:
    """`scores.json`, `predictions.parquet`, `errors.csv`, the pictures and `report.html`.

    `record` is what `measure` gives, with what the report says of rivals; `about` what was measured, in words.
    """
    predictions = answers.predictions
    wrong = (p for p in predictions if p.predicted != p.label)
    mistakes = sorted(wrong, key=lambda p: (-p.confidence, p.text))[:N_MISTAKES]
    (folder / "scores.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _write_predictions(folder / "predictions.parquet", predictions, answers)
    with (folder / "errors.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [[m.text, shown(m.label), shown(m.predicted), m.confidence] for m in mistakes]
        csv.writer(file, lineterminator="\n").writerows([["text", "label", "predicted", "confidence"], *rows])
    (folder / "per_class.png").write_bytes(plots.class_bars([ClassScore(**row) for row in record["per_class"]]))
    pictures = draw(answers)
    for name, picture in pictures.items():
        (folder / f"{name}.png").write_bytes(picture.light)
    (folder / "report.html").write_text(report.render(record, mistakes, pictures, about), encoding="utf-8")


def _write_predictions(path: Path, predictions: list[Prediction], answers: Answers) -> None:
    """A row a text. `probabilities` are calibrated, float32, in the order of the classes in scores.json."""
    columns: dict[str, Any] = {
        name: [getattr(p, name) for p in predictions] for name in ("text", "label", "predicted", "confidence")
    }
    if answers.multi_label:
        columns |= {name: lists_of_texts(columns[name]) for name in ("label", "predicted")}
    flat = pa.array(answers.served.astype(np.float32).ravel())
    offsets = pa.array(np.arange(0, answers.served.size + 1, len(answers.names), dtype=np.int32))
    write_table(path, {**columns, "probabilities": pa.ListArray.from_arrays(offsets, flat)})


def draw(answers: Answers) -> dict[str, Picture]:
    """The pictures of the page, by the names of their files. Curves are left out where only one class occurs."""
    names, drawn = answers.names, answers.curves
    bins = {"uncalibrated": metrics.calibration_bins(answers.targets, answers.raw)}
    if answers.temperature != 1:
        bins["calibrated"] = metrics.calibration_bins(answers.targets, answers.served)
    confident = curves.most_confident(answers.targets, answers.served)
    pictures = {
        "reliability": _both(plots.reliability_diagram, bins, "answers" if answers.multi_label else "texts"),
        "coverage": _both(curve_plots.coverage_curve, confident),
    }
    if not answers.multi_label:
        pictures["confusion"] = _both(plots.confusion_matrix, answers.labelling.confusion, names)
    if drawn.roc:
        pictures["roc"] = _both(curve_plots.roc_curves, drawn.roc, drawn.macro_roc)
        pictures["precision_recall"] = _both(
            curve_plots.precision_recall_curves, drawn.precision_recall, drawn.macro_precision_recall
        )
    return pictures


def _both(picture: Callable[..., bytes], *what: Any) -> Picture:
    drawing = partial(picture, *what)
    return Picture(drawing(theme=plots.LIGHT), drawing(theme=plots.DARK))
