import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.publish import digests
from pipeline.runner import Built
from pipeline.splitting import LabelledSplit
from pipeline.stage import Context
from pipeline.stages.evaluate import Evaluate, Evaluation, _ready, _scaled
from pipeline.stages.labels import LabelsStage
from pipeline.store import Store
from tests.pipeline.data_stages import made
from tests.pipeline.toy_classifier import SCRIPT, evaluate_of, labels_of


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> LabelsStage:
    return labels_of(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def stage(labels: LabelsStage) -> Evaluate:
    return evaluate_of(labels, random_init=True)


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
    assert scores["baseline"]["name"] == "tfidf-logreg"
    assert scores["baseline"]["macro_f1"] > 0.8
    assert scores["baseline"]["lead"] == pytest.approx(scores["macro_f1"] - scores["baseline"]["macro_f1"], abs=2e-6)
    assert scores["random_init"]["macro_f1"] != scores["macro_f1"]
    assert scores["majority"]["accuracy"] < 0.6
    assert scores["scaled"]["log_loss"] < scores["log_loss"]
    assert [row["name"] for row in scores["per_class"]] == ["a|b <i>_", "fruit", "metal"]


def test_the_predictions_are_kept_and_agree_with_the_scores(evaluation: Evaluation):
    table = pq.read_table(evaluation.path / "predictions.parquet").to_pydict()
    assert list(table) == ["text", "label", "predicted", "confidence"]
    right = np.array(table["label"]) == np.array(table["predicted"])
    assert right.mean() == pytest.approx(evaluation.scores["accuracy"], abs=1e-6)
    assert all(1 / 3 <= c <= 1 for c in table["confidence"])


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
    assert not {"script", "i", "iframe", "link", "base"} & {tag for tag, _ in tags.found}
    assert SCRIPT not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in page
    assert "default-src 'none'" in page
    sources = [value for _, attrs in tags.found for name, value in attrs.items() if name in ("src", "srcset", "href")]
    assert len(sources) == 6
    assert all(source and source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|url\(|@import| on\w+=", page)


def test_the_report_names_the_baseline_and_says_who_leads(evaluation: Evaluation):
    page = (evaluation.path / "report.html").read_text()
    assert "TF-IDF + logistic regression" in page
    assert re.search(r"Macro-F1 is 0\.\d{3} below TF-IDF", page)


def test_equal_inputs_give_equal_bytes(stage: Evaluate, built: Built, evaluation: Evaluation, tmp_path: Path):
    again = made(stage, tmp_path)
    assert again.digest == built.digest, digests(evaluation.path)


def test_timings_and_headline_numbers_are_notes(built: Built, evaluation: Evaluation):
    metrics = built.notes["metrics"]
    assert metrics["test/macro_f1"] == evaluation.scores["macro_f1"]
    assert metrics["baseline/macro_f1"] == evaluation.scores["baseline"]["macro_f1"]
    assert metrics["test/latency_seconds"] > 0
    assert metrics["test/texts_per_second"] > 0
    assert metrics["baseline/seconds"] > 0
    assert "TF-IDF" in built.notes["headline"]
    assert {"report.html", "scores.json", "confusion.png"} <= set(built.notes["files"])


def test_baseline_and_random_weights_can_be_left_out(labels: LabelsStage, home: Path):
    stage = evaluate_of(labels, baseline=False)
    folder = Store(home).open("evaluate", made(stage, home).key)
    scores = stage.load(folder).scores
    assert scores["baseline"] is None
    assert scores["random_init"] is None
    assert "TF-IDF" not in (folder / "report.html").read_text()


def test_without_validation_rows_nothing_is_rescaled(stage: Evaluate, home: Path, built: Built, tmp_path: Path):
    loaded = _ready(stage.classifier.load(_input_path(home, built)))
    ctx = Context(store=Store(home), kind="evaluate", key="", keys={}, out=tmp_path, work=tmp_path)
    empty = LabelledSplit([], np.array([], dtype=np.int64))
    assert _scaled(ctx, loaded, empty, np.array([0]), np.full((1, 3), 1 / 3)) is None


def _input_path(home: Path, built: Built) -> Path:
    manifest = Store(home).find("evaluate", built.key)
    assert manifest
    return Store(home).path("randomclassifier", manifest.meta["input_keys"]["classifier"]["key"])
