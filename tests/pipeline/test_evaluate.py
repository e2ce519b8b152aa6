import csv
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import metrics
from pipeline.publish import digests
from pipeline.runner import Built, build, submit_here
from pipeline.stage import Context, Told
from pipeline.stages import evaluate
from pipeline.stages.evaluate import Evaluate, EvaluateConfig, Evaluation
from pipeline.stages.labels import LabelsStage
from pipeline.store import Store
from pipeline.weights import HELD_OUT
from tests.pipeline.data_stages import corpus_of, made
from tests.pipeline.toy_classifier import SCRIPT, RandomClassifier, evaluate_of, labels_of


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> LabelsStage:
    return labels_of(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def stage(labels: LabelsStage, tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    """With a corpus that holds every ninth of the labelled texts."""
    rows = [json.loads(line) for line in Path(labels.config.path).read_text().splitlines()]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(["something else", *(f"well, {row['text']}" for row in rows[::9])]))
    repeats = tuple(RandomClassifier(labels=labels, seed=seed, label=f"seed-{seed}") for seed in (2, 3))
    return replace(evaluate_of(labels, random_init=True), corpus=corpus_of(path), repeats=repeats)


@pytest.fixture(scope="module")
def built(stage: Evaluate, home: Path) -> Built:
    return made(stage, home)


@pytest.fixture(scope="module")
def evaluation(stage: Evaluate, home: Path, built: Built) -> Evaluation:
    return stage.load(Store(home).open("evaluate", built.key))


def test_the_scores_have_the_rivals_beside_the_model(evaluation: Evaluation):
    scores = evaluation.scores
    assert scores["n"] == 60
    low, high = scores["accuracy_ci"]
    assert low <= scores["accuracy"] <= high
    assert [rival["name"] for rival in scores["baselines"]] == ["tfidf-logreg", "linear-svm"]
    for rival in scores["baselines"]:
        assert rival["macro_f1"] > 0.8
        assert rival["lead"] == pytest.approx(scores["macro_f1"] - rival["macro_f1"], abs=2e-6)
        low, high = rival["lead_ci"]
        assert low <= rival["lead"] <= high < 0
        assert rival["p_value"] < 0.05
    assert scores["baseline"] == scores["baselines"][0]
    assert scores["random_init"]["macro_f1"] != scores["macro_f1"]
    assert scores["majority"]["accuracy"] < 0.6
    assert [row["name"] for row in scores["per_class"]] == ["a|b <i>_", "fruit", "metal"]


def test_a_rival_learns_once_whatever_becomes_of_the_classifier(
    labels: LabelsStage, stage: Evaluate, home: Path, evaluation: Evaluation
):
    other = replace(stage, classifier=RandomClassifier(labels=labels, seed=7, label="other"))
    events = {event.stage.name: event for event in build([other], Store(home), submit_here) if isinstance(event, Built)}
    assert events["evaluate"].status == "built"
    for rival in evaluation.scores["baselines"]:
        known = events[f"baseline-{rival['name']}"]
        assert known.status == "reused"
        assert known.notes["metrics"] == {f"test/{kind}": rival[kind] for kind in ("accuracy", "macro_f1")}


def test_the_spread_over_seeds_has_the_exported_one_first(evaluation: Evaluation):
    scores = evaluation.scores
    for kind in ("accuracy", "macro_f1"):
        first, *others = scores["seeds"][kind]["values"]
        assert first == scores[kind]
        assert len({first, *others}) == 3
        assert scores["seeds"][kind]["mean"] == pytest.approx(np.mean([first, *others]), abs=1e-6)
        assert scores["seeds"][kind]["std"] == pytest.approx(np.std([first, *others], ddof=1), abs=1e-6)
    assert "Fine-tuned with 3 seeds" in (evaluation.path / "report.html").read_text()


def test_many_texts_are_shared_out_over_tasks_without_a_difference(
    stage: Evaluate, home: Path, tmp_path: Path, built: Built, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluate, "TEXTS_PER_TASK", 25)
    shared: list[int] = []

    def map_(function: Callable[[Any], Any], items: list[Any], told: Told) -> list[Any]:
        shared.extend(len(texts) for _, texts in items)
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(function, items))
        told(len(results))
        return results

    again = made(stage, tmp_path, map_)
    assert shared == [25, 25, 10] * 5  # test and validation texts, random weights, and two more seeds
    once, shared_out = (
        pq.read_table(Store(h).path("evaluate", b.key) / "predictions.parquet")
        for h, b in ((home, built), (tmp_path, again))
    )
    assert shared_out.column("predicted") == once.column("predicted")
    there, here = (np.stack(table.column("probabilities").to_pylist()) for table in (shared_out, once))
    np.testing.assert_allclose(there, here, atol=1e-5)


def test_the_temperature_is_that_of_the_validation_texts_and_both_calibrations_are_kept(evaluation: Evaluation):
    scores = evaluation.scores
    assert scores["temperature"] > 1, "random weights are sure of what they do not know"
    assert set(scores["calibrated"]) == {"log_loss", "brier", "ece"}
    assert all(scores["calibrated"][name] < scores[name] for name in scores["calibrated"])
    assert "scaled" not in scores


def test_the_predictions_are_kept_calibrated_and_agree_with_the_scores(evaluation: Evaluation):
    table = pq.read_table(evaluation.path / "predictions.parquet")
    assert table.column_names == ["text", "label", "predicted", "confidence", "probabilities"]
    assert table.schema.field("probabilities").type == pa.list_(pa.float32())
    rows, names = table.to_pydict(), [row["name"] for row in evaluation.scores["per_class"]]
    right = np.array(rows["label"]) == np.array(rows["predicted"])
    assert right.mean() == pytest.approx(evaluation.scores["accuracy"], abs=1e-6)
    served = np.array(rows["probabilities"])
    np.testing.assert_allclose(served.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(served.max(axis=1), rows["confidence"], atol=1e-5)
    assert [names[i] for i in served.argmax(axis=1)] == rows["predicted"]
    targets = np.array([names.index(label) for label in rows["label"]])
    assert metrics.calibration(targets, served) == pytest.approx(evaluation.scores["calibrated"], abs=1e-4)


def test_slices_thresholds_and_confusions_add_up(evaluation: Evaluation):
    scores = evaluation.scores
    quarters = [part for part in scores["slices"]["length"] if not part["name"].startswith("cut off")]
    assert sum(part["n"] for part in quarters) == 60
    right = sum(part["n"] * part["accuracy"] for part in quarters)
    assert right == pytest.approx(60 * scores["accuracy"], abs=1e-3)
    assert scores["slices"]["length"][-1]["name"] == "cut off after 22 tokens"
    assert scores["thresholds"][0]["macro_f1"] == scores["macro_f1"]
    assert scores["cuts"] is None
    assert sum(pair["count"] for pair in scores["confusions"]) == pytest.approx(60 * (1 - scores["accuracy"]), abs=1e-3)
    assert all(pair["label"] != pair["predicted"] for pair in scores["confusions"])


def test_test_texts_in_the_corpus_are_counted_and_shown(evaluation: Evaluation, labels: LabelsStage):
    found = evaluation.scores["contamination"]
    splits = [json.loads(line)["split"] for line in Path(labels.config.path).read_text().splitlines()[::9]]
    assert found["corpus"]["n"] == splits.count("test") > 0
    assert found["corpus"]["share"] == pytest.approx(found["corpus"]["n"] / 60, abs=1e-6)
    assert found["corpus"]["clean"]["n"] + found["corpus"]["found"]["n"] == 60
    [example, *_] = found["corpus"]["examples"]
    assert example["excerpt"].startswith("well, ")
    page = (evaluation.path / "report.html").read_text()
    assert "Were the test texts there to be learned?" in page


def test_the_error_table_has_the_most_confident_mistakes_first(evaluation: Evaluation):
    with (evaluation.path / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    confidence = [float(row["confidence"]) for row in rows]
    assert confidence == sorted(confidence, reverse=True)
    assert 0 < len(rows) <= 50
    assert all(row["label"] != row["predicted"] for row in rows)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_report_shows_hostile_text_as_text_and_fetches_nothing(evaluation: Evaluation):
    page = (evaluation.path / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not {"script", "i", "iframe", "link", "base", "form"} & {tag for tag, _ in tags.found}
    assert SCRIPT not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert "default-src 'none'" in page
    values = [(name, value or "") for _, attrs in tags.found for name, value in attrs.items()]
    pictures = [value for name, value in values if name in ("src", "srcset")]
    assert len(pictures) == 2 * 5
    assert all(value.startswith("data:image/png;base64,") for value in pictures)
    assert not [value for name, value in values if name == "href"], "in a sandboxed frame links go nowhere"
    labels = {value for name, value in values if name == "for"}
    assert len(labels) >= 8
    assert labels == {value for name, value in values if name == "id" and value.startswith("to-")}
    assert not re.search(r"https?:|url\(|@import| on\w+=", page)


def test_the_report_names_the_baseline_and_says_who_leads(evaluation: Evaluation):
    page = (evaluation.path / "report.html").read_text()
    assert "TF-IDF + logistic regression" in page
    assert "linear SVM" in page
    assert re.search(r"Macro-F1 is 0\.\d{3} below TF-IDF", page)


def test_equal_inputs_give_equal_bytes(stage: Evaluate, built: Built, evaluation: Evaluation, tmp_path: Path):
    again = made(stage, tmp_path)
    assert again.digest == built.digest, digests(evaluation.path)


def test_timings_and_headline_numbers_are_notes(built: Built, evaluation: Evaluation):
    noted = built.notes["metrics"]
    assert noted["test/macro_f1"] == evaluation.scores["macro_f1"]
    assert noted["test/calibrated_ece"] == evaluation.scores["calibrated"]["ece"]
    assert noted["test/temperature"] == evaluation.scores["temperature"]
    assert noted["baseline/macro_f1"] == evaluation.scores["baseline"]["macro_f1"]
    assert noted["linear-svm/macro_f1"] == evaluation.scores["baselines"][1]["macro_f1"]
    assert 0 < noted["test/latency_seconds"] <= noted["test/latency_p95_seconds"]
    assert noted["test/tokens_per_second"] > noted["test/texts_per_second"] > 0
    assert noted["contamination/seconds"] > 0
    assert noted["contamination/corpus_share"] == evaluation.scores["contamination"]["corpus"]["share"]
    for word in ("best baseline", "ms a text", "p95", "texts/s"):
        assert word in built.notes["headline"]
    assert {"report.html", "scores.json", "confusion.png", "roc.png", "precision_recall.png"} <= set(
        built.notes["files"]
    )
    assert not re.search(r"second|latency", (evaluation.path / "scores.json").read_text())


def test_a_baseline_named_twice_is_refused():
    with pytest.raises(ValueError, match="name each once"):
        EvaluateConfig(baselines=("linear-svm", "linear-svm"))


def only(labels: LabelsStage, keep: Callable[[dict[str, Any]], bool], **config: Any) -> LabelsStage:
    """The same stage, over the rows to keep."""
    path = Path(labels.config.path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row) for row in rows if keep(row)))
    return replace(labels, config=replace(labels.config, **config))


class HasLearnedMore(RandomClassifier):
    """It was half as sure as it was right of the validation texts, by what it kept of them."""

    def run(self, ctx: Context) -> None:
        super().run(ctx)
        targets = ctx.open(self.labels).new_validation().targets
        np.save(ctx.out / HELD_OUT, np.where(np.eye(3)[targets] == 1, 0.5, 0.25).astype(np.float32))


def test_the_temperature_is_that_of_what_was_said_before_the_validation_texts_were_learned_from(
    labels: LabelsStage, home: Path
):
    stage = evaluate_of(labels, baselines=(), contamination=False)
    stage = replace(stage, classifier=HasLearnedMore(labels=labels))
    scores = stage.load(Store(home).open("evaluate", made(stage, home).key)).scores
    assert scores["temperature"] < 1, "of the test texts random weights are too sure"


def test_without_validation_rows_nothing_is_rescaled_and_all_that_costs_time_can_be_left_out(
    tmp_path: Path, home: Path
):
    labels = only(labels_of(tmp_path), lambda row: row["split"] != "validation", validation_fraction=0.0)
    stage = evaluate_of(labels, baselines=(), contamination=False)
    folder = Store(home).open("evaluate", made(stage, home).key)
    scores, page = stage.load(folder).scores, (folder / "report.html").read_text()
    assert scores["temperature"] == 1.0
    assert scores["calibrated"] == pytest.approx({name: scores[name] for name in scores["calibrated"]}, abs=1e-4)
    assert "not calibrated" in page
    assert scores["baselines"] == []
    for name in ("baseline", "random_init", "seeds", "contamination"):
        assert scores[name] is None
    assert "TF-IDF" not in page
    assert 'id="contamination"' not in page


def test_two_classes_get_a_table_of_where_to_draw_the_line_and_no_corpus_is_no_error(tmp_path: Path, home: Path):
    labels = only(labels_of(tmp_path), lambda row: row["label"] != "metal")
    stage = evaluate_of(labels, baselines=("linear-svm",))
    folder = Store(home).open("evaluate", made(stage, home).key)
    scores = stage.load(folder).scores
    assert scores["cuts"]["positive"] == "fruit"
    recalls = [row["recall"] for row in scores["cuts"]["rows"]]
    assert recalls == sorted(recalls, reverse=True)
    assert "Where to draw the line" in (folder / "report.html").read_text()
    assert scores["baseline"]["name"] == "linear-svm"
    assert scores["contamination"]["corpus"] is None
    assert scores["contamination"]["training"]["n"] >= 0
