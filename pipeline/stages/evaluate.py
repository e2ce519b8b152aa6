"""How good the classifier is on texts that nothing was chosen by, beside what it must beat."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Le

from pipeline import assessment, metrics
from pipeline.assessment import Answers
from pipeline.baselines import BaselineName, majority
from pipeline.bootstrap import compare
from pipeline.classify import probabilities
from pipeline.contamination import Place, Suspects
from pipeline.engine import pick_device
from pipeline.identity import added
from pipeline.labelling import Labelling, rounded
from pipeline.speed import Clock, latency
from pipeline.stage import Context, Resources, Stage
from pipeline.stages.baseline import Baseline
from pipeline.stages.corpus import Corpus
from pipeline.stages.labels import Labels
from pipeline.targets import Probabilities
from pipeline.weights import ClassifierFiles, LoadedClassifier

TEXTS_PER_TASK = 8192
"""So many that the seconds in which a process starts are few beside them."""
MEASURED = ("accuracy", "macro_f1", "micro_f1", "ece", "log_loss", "brier")
"""What of scores.json runs are compared by; micro_f1 is there where a text may have several classes."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured on the test texts."""

    bootstrap: Annotated[int, Ge(100), Le(100_000)] = 1000
    """Resamples behind every confidence interval."""
    baselines: tuple[BaselineName, ...] = ("tfidf-logreg", "linear-svm")
    """Linear rivals, each a stage that knows the labelled texts alone: tfidf-logreg (words and pairs of them),
    linear-svm (also parts of words)."""
    random_init: bool = False
    """Also fine-tune the same body from random weights: what pretraining was worth."""
    seeds: Annotated[int, Ge(1), Le(100)] = added(1)
    """Fine-tune with so many seeds in all, to see how much of a score is chance. The first is what is exported."""
    contamination: bool = True
    """Look for the test texts in the pretraining corpus and among the training texts, about a second for 50 MB."""

    def __post_init__(self) -> None:
        if len(set(self.baselines)) < len(self.baselines):
            raise ValueError(f"baselines={list(self.baselines)}: name each once")


@dataclass(frozen=True)
class Evaluation:
    """`scores.json`, the predictions behind it, the pictures and the report."""

    path: Path

    @cached_property
    def scores(self) -> dict[str, Any]:
        """What `assessment.measure` gives, and what the classifier is compared with.

        `baselines` is a list; `random_init`, `majority` and `baseline` (the first of the list) are a dict or None:
        the fields of `bootstrap.Comparison` each, baselines with their `name`. `seeds` is None or `spread` of
        accuracy and of macro_f1, `contamination` is None or the fields of `contamination.Contamination`.
        """
        return json.loads((self.path / "scores.json").read_text(encoding="utf-8"))


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage[Evaluation]):
    """Measures a classifier on the test split. `random_init` is the same body, fine-tuned from random weights.

    `repeats` are the same classifier fine-tuned with other seeds, `corpus` is what the test texts are looked for in,
    `baselines` are those that the config names.
    """

    VERSION = 5

    config: EvaluateConfig
    classifier: Stage[ClassifierFiles]
    labels: Stage[Labels]
    corpus: Stage[Corpus] | None = None
    random_init: Stage[ClassifierFiles] | None = None
    repeats: tuple[Stage[ClassifierFiles], ...] = added(())
    baselines: tuple[Baseline, ...] = added(())
    seed: int = 0

    def __post_init__(self) -> None:
        assert tuple(one.rival for one in self.baselines) == self.config.baselines, "those that the config names"

    @property
    def resources(self) -> Resources:
        return Resources(cpus=0)

    def load(self, path: Path) -> Evaluation:
        return Evaluation(path)

    def run(self, ctx: Context) -> None:
        torch.set_num_threads(ctx.cpus)
        labels, clock = ctx.open(self.labels), Clock()
        classifier = Ready.of(ctx.open(self.classifier))
        answers = _answers(ctx, classifier, labels, clock)
        measured = assessment.measure(answers, resamples=self.config.bootstrap, seed=self.seed)
        record = {
            **measured,
            **self._rivals(ctx, labels, answers.labelling),
            "seeds": self._seeds(ctx, labels, answers.labelling) if self.repeats else None,
            "contamination": self._contamination(ctx, labels, answers, clock) if self.config.contamination else None,
        }
        assessment.write(ctx.out, record, answers)
        ctx.notes["datasets"] = [ctx.dataset(self.labels, "test")]
        _note(ctx, record, _speed(clock, answers, classifier.loaded))

    def _rivals(self, ctx: Context, labels: Labels, ours: Labelling) -> dict[str, Any]:
        """What the classifier is compared with: scores and our lead, or None for what was left out."""
        train, validation, test = labels.split("train"), labels.split("validation"), labels.split("test")
        linear = [{"name": one.rival, **self._compared(ours, ctx.open(one).load())} for one in self.baselines]
        random_init = None
        if self.random_init is not None:
            table = _probabilities(ctx, Ready.of(ctx.open(self.random_init)), test.texts)
            random_init = self._compared(ours, Labelling.of_probabilities(ours.targets, table).predicted)
        learned_from = np.concatenate([train.targets, validation.targets])
        return {
            "baseline": linear[0] if linear else None,
            "baselines": linear,
            "random_init": random_init,
            "majority": self._compared(ours, majority(learned_from, len(test.texts))),
        }

    def _seeds(self, ctx: Context, labels: Labels, ours: Labelling) -> dict[str, Any]:
        """Accuracy and macro-F1 of every seed, the exported one first, with their mean and standard deviation."""
        test = labels.split("test")
        tables = (_probabilities(ctx, Ready.of(ctx.open(repeat)), test.texts) for repeat in self.repeats)
        others = [Labelling.of_probabilities(ours.targets, table) for table in tables]
        return {
            "accuracy": spread([labelling.accuracy for labelling in (ours, *others)]),
            "macro_f1": spread([labelling.macro_f1 for labelling in (ours, *others)]),
        }

    def _compared(self, ours: Labelling, predicted: np.ndarray) -> dict[str, Any]:
        theirs = Labelling(ours.targets, predicted, ours.n_labels)
        return compare(ours, theirs, resamples=self.config.bootstrap, seed=self.seed).to_json()

    def _contamination(self, ctx: Context, labels: Labels, answers: Answers, clock: Clock) -> dict[str, Any]:
        corpus = ctx.open(self.corpus) if self.corpus else None
        known = [*labels.split("train").texts, *labels.split("validation").texts]
        suspects = Suspects(
            texts=answers.texts,
            labels=answers.labels,
            slicing=answers.slicing(self.config.bootstrap, self.seed),
        )
        with clock.time("contamination"):
            found = suspects.examine(
                corpus and Place(corpus.documents, corpus.n_documents),
                Place(lambda: known, len(known)),
                partial(ctx.tracker.progress, text="documents searched for test texts"),
            )
        return found.to_json()


def spread(values: Sequence[float]) -> dict[str, Any]:
    """`{values, mean, std}` of two or more; std is that of the population they are a sample of."""
    return {"values": [rounded(v) for v in values], "mean": rounded(mean(values)), "std": rounded(stdev(values))}


@dataclass(frozen=True)
class Ready:
    """A classifier where this process computes, and the files that another would load it from."""

    files: ClassifierFiles
    loaded: LoadedClassifier

    @classmethod
    def of(cls, files: ClassifierFiles) -> "Ready":
        loaded = files.load()
        loaded.model.to(pick_device("auto"))
        return cls(files, loaded)


def _probabilities(ctx: Context, classifier: Ready, texts: list[str]) -> Probabilities:
    """In float32, as the export computes, so that the scores are of what a user gets. CPUs share out many texts."""
    if len(texts) <= TEXTS_PER_TASK or pick_device("auto").type != "cpu":
        show = partial(ctx.tracker.progress, text="texts classified")
        return probabilities(classifier.loaded, texts, precision="fp32", on_progress=show)
    starts = range(0, len(texts), TEXTS_PER_TASK)
    pieces = [(classifier.files, texts[first : first + TEXTS_PER_TASK]) for first in starts]
    return np.concatenate(ctx.spread(classify_piece, pieces, f"classifying {len(texts):,} texts"))


def classify_piece(piece: tuple[ClassifierFiles, list[str]]) -> Probabilities:
    """The probabilities of some texts, in any process that sees the files; the same bits on any number of threads."""
    files, texts = piece
    return probabilities(files.load(), texts, precision="fp32")


def _answers(ctx: Context, classifier: Ready, labels: Labels, clock: Clock) -> Answers:
    """What the classifier says of the test texts, at the temperature that fits new validation texts; without any, 1."""
    test, validation = labels.split("test"), labels.new_validation()
    with clock.time("classifier"):
        table = _probabilities(ctx, classifier, test.texts)
    temperature = 1.0
    if validation.texts:
        said = classifier.files.held_out
        said = _probabilities(ctx, classifier, validation.texts) if said is None else said
        temperature = metrics.temperature(validation.targets, said)
    return Answers.of(classifier.loaded, test, table, temperature)


def _speed(clock: Clock, answers: Answers, loaded: LoadedClassifier) -> dict[str, float]:
    """Throughput in large batches, latency of single texts, and what the rest cost."""
    spent = clock.seconds["classifier"]
    median, slow = latency(loaded, answers.texts)
    others = {f"{what}/seconds": seconds for what, seconds in clock.seconds.items() if what != "classifier"}
    return {
        "test/texts_per_second": len(answers.texts) / spent,
        "test/tokens_per_second": float(answers.n_read.sum()) / spent,
        "test/latency_seconds": median,
        "test/latency_p95_seconds": slow,
        **others,
    }


def _note(ctx: Context, record: dict[str, Any], speed: dict[str, float]) -> None:
    """What stands beside the artifact: the numbers by which runs are compared, and how fast it went."""
    whole = {f"test/{name}": record[name] for name in MEASURED if name in record}
    areas = {f"test/{name}": record[name] for name in ("roc_auc", "average_precision") if record[name] is not None}
    calibrated = {f"test/calibrated_{name}": value for name, value in record["calibrated"].items()}
    rivals = {f"{name}/{kind}": rival[kind] for name, rival in _named(record) for kind in ("accuracy", "macro_f1")}
    low, high = record["macro_f1_ci"]
    interval = {"test/macro_f1_low": low, "test/macro_f1_high": high, "test/temperature": record["temperature"]}
    noted = {**whole, **interval, **areas, **calibrated, **rivals, **_over_seeds(record), **_leaks(record), **speed}
    ctx.notes["metrics"] = noted
    ctx.notes["headline"] = _headline(record, speed)
    ctx.notes["files"] = sorted(path.name for path in ctx.out.iterdir() if path.suffix != ".parquet")


def _named(record: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every rival by the name its metrics have: the first baseline is "baseline", whichever it is."""
    single = [(name, record[name]) for name in ("random_init", "baseline", "majority") if record[name]]
    return [*single, *((rival["name"], rival) for rival in record["baselines"][1:])]


def _over_seeds(record: dict[str, Any]) -> dict[str, float]:
    over = record["seeds"] or {}
    return {f"test/{kind}_over_seeds_{name}": over[kind][name] for kind in over for name in ("mean", "std")}


def _leaks(record: dict[str, Any]) -> dict[str, float]:
    found = record["contamination"] or {}
    return {
        f"contamination/{place}_share": found[place]["share"] for place in ("corpus", "training") if found.get(place)
    }


def _headline(record: dict[str, Any], speed: dict[str, float]) -> str:
    low, high = record["macro_f1_ci"]
    best = max(record["baselines"], key=lambda rival: rival["macro_f1"], default=None)
    beside = f", best baseline {best['macro_f1']:.3f} ({best['name']})" if best else ""
    fast = f"{1000 * speed['test/latency_seconds']:.1f} ms a text (p95 {1000 * speed['test/latency_p95_seconds']:.1f})"
    many = f"{speed['test/texts_per_second']:,.0f} texts/s in batches"
    return f"test macro-F1 {record['macro_f1']:.3f} ({low:.3f} to {high:.3f}){beside}; {fast}, {many}"
