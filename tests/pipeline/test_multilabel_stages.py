"""A classifier of texts with several classes, or none: learned, measured, shown and exported."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, log_loss

from pipeline import export, metrics
from pipeline.classify import probabilities
from pipeline.publish import digests
from pipeline.runner import Built
from pipeline.stages.finetune import balanced_weights, weighs_classes
from pipeline.store import Store
from pipeline.targets import encode
from pipeline.tracking import read_journal
from tests.pipeline.data_stages import made, opened
from tests.pipeline.toy_multilabel import CLASSES, Toy, toy

NAMES = sorted(CLASSES)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return toy(tmp_path_factory.mktemp("data"), formats=("hf", "onnx"))


@pytest.fixture(scope="module")
def evaluated(stages: Toy, home: Path) -> Built:
    return made(stages.evaluate, home)


@pytest.fixture(scope="module")
def folder(evaluated: Built, home: Path) -> Path:
    """What the evaluation wrote."""
    return Store(home).open("evaluate", evaluated.key)


@pytest.fixture(scope="module")
def scores(stages: Toy, folder: Path) -> dict[str, Any]:
    return stages.evaluate.load(folder).scores


@pytest.fixture(scope="module")
def exported(stages: Toy, home: Path) -> Path:
    return Store(home).open("export", made(stages.export, home).key)


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, list[Any]]:
    return pq.read_table(folder / "predictions.parquet").to_pydict()


def test_training_lowers_the_loss_and_beats_the_majority(
    stages: Toy, home: Path, evaluated: Built, scores: dict[str, Any]
):
    key = made(stages.finetune, home).key
    points = list(read_journal(Store(home).journal("finetune", key)))
    losses = [p.metrics["train/loss"] for p in points if "train/loss" in p.metrics]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert losses[0] == pytest.approx(np.log(2), abs=0.1)  # of one label, as `mean over labels` says
    assert scores["macro_f1"] > scores["majority"]["macro_f1"] + 0.4
    assert scores["majority"]["lead_ci"][0] > 0
    assert {"val/macro_f1", "val/accuracy"} <= made(stages.finetune, home).notes["metrics"].keys()
    assert evaluated.notes["metrics"]["test/micro_f1"] == scores["micro_f1"]


def test_scores_are_those_of_scikit_learn_on_the_predictions(scores: dict[str, Any], rows: dict[str, list[Any]]):
    truth, said = (encode(rows[column], NAMES, multi_label=True) for column in ("label", "predicted"))
    served = np.array(rows["probabilities"])
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, said), abs=1e-6)
    assert scores["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"), abs=1e-6)
    assert scores["micro_f1"] == pytest.approx(f1_score(truth, said, average="micro"), abs=1e-6)
    assert ((served >= 0.5) == said).all()
    np.testing.assert_allclose(np.maximum(served, 1 - served).prod(axis=1), rows["confidence"], atol=1e-5)
    calibrated = scores["calibrated"]
    pairs = list(zip(truth.T, served.T, strict=True))
    assert calibrated["log_loss"] == pytest.approx(np.mean([log_loss(*pair) for pair in pairs]), abs=1e-4)
    assert calibrated["brier"] == pytest.approx(np.mean([brier_score_loss(*pair) for pair in pairs]), abs=1e-5)
    assert metrics.calibration(truth, served)["ece"] == pytest.approx(calibrated["ece"], abs=1e-4)
    assert {0, 1, 2} <= {len(label) for label in rows["label"]}


def test_the_file_has_the_keys_of_any_evaluation(scores: dict[str, Any], folder: Path):
    assert scores["multi_label"] is True
    assert scores["confusions"] is scores["cuts"] is None
    for name in ("n", "roc_auc", "average_precision", "temperature", "bins", "thresholds", "baseline", "random_init"):
        assert scores[name], name
    assert [row["name"] for row in scores["per_class"]] == NAMES
    assert [rival["name"] for rival in scores["baselines"]] == ["tfidf-logreg", "linear-svm"]
    assert all(rival["macro_f1"] > 0.8 for rival in scores["baselines"])
    assert sum(part["n"] for part in scores["slices"]["length"]) == scores["n"]
    assert scores["seeds"]["macro_f1"]["values"][0] == scores["macro_f1"]
    assert sum(b["count"] for b in scores["bins"]) == scores["n"] * len(NAMES)
    assert scores["contamination"]["corpus"]["n"] > 0
    assert pq.read_schema(folder / "predictions.parquet").field("predicted").type == pa.list_(pa.string())


def test_mistakes_come_with_all_their_classes_the_surest_first(folder: Path, rows: dict[str, list[Any]]):
    with (folder / "errors.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    wrong = sum(a != b for a, b in zip(rows["label"], rows["predicted"], strict=True))
    assert len(found) == min(wrong, 50) > 0
    sure = [float(row["confidence"]) for row in found]
    assert sure == sorted(sure, reverse=True)
    first = rows["text"].index(found[0]["text"])
    assert found[0]["label"] == ", ".join(rows["label"][first])


def test_the_page_has_no_confusion_matrix_and_says_what_accuracy_means(folder: Path):
    page = (folder / "report.html").read_text()
    for part in (
        "Micro-F1",
        "all its classes are",
        "the most frequent set of classes",
        "&lt;i&gt;metal",
        "runs from 0 to 1",
    ):
        assert part in page, part
    assert "onfusion" not in page
    assert not (folder / "confusion.png").exists()
    assert {"roc.png", "per_class.png", "reliability.png", "coverage.png"} <= {p.name for p in folder.iterdir()}


def test_equal_inputs_give_equal_bytes(tmp_path: Path, stages: Toy, evaluated: Built, folder: Path):
    again = made(stages.evaluate, tmp_path)
    assert again.digest == evaluated.digest, digests(folder)


def test_the_export_is_a_stock_folder_whose_pipeline_gives_the_served_probabilities(
    exported: Path, rows: dict[str, list[Any]]
):
    from transformers import pipeline

    config = json.loads((exported / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    classify: Any = pipeline("text-classification", model=str(exported), device="cpu")
    texts, served = rows["text"][:8], rows["probabilities"][:8]
    for answer, expected in zip(classify(texts, truncation=True, top_k=None), served, strict=True):
        by_name = {item["label"]: item["score"] for item in answer}
        assert by_name == pytest.approx(dict(zip(NAMES, expected, strict=True)), abs=1e-4)


def test_what_is_read_back_still_gives_several_classes_at_the_served_probabilities(
    exported: Path, rows: dict[str, list[Any]]
):
    assert json.loads((exported / "onnx" / "model.json").read_text())["multi_label"] is True
    for place in (exported, exported / "onnx"):
        back = export.read(place).loaded
        assert back.multi_label
        np.testing.assert_allclose(probabilities(back, rows["text"][:20]), rows["probabilities"][:20], atol=1e-5)


def test_the_card_says_what_it_answers(exported: Path):
    card = (exported / "README.md").read_text()
    for part in (
        "any number of 4 classes, or none",
        "top_k=None",
        "micro-F1",
        "judges each label by itself",
        "multi-label",
    ):
        assert part in card, part
    assert "with one of" not in card


def test_balanced_weights_make_a_class_and_its_absence_weigh_the_same():
    targets = np.array([[1, 1], [0, 1], [0, 1], [0, 1]])
    torch.testing.assert_close(balanced_weights(targets), torch.tensor([3.0, 0.25]))


@pytest.mark.parametrize(
    ("choice", "one", "several"), [("auto", True, False), ("none", False, False), ("balanced", True, True)]
)
def test_classes_count_alike_by_default_where_a_text_has_one(choice: str, one: bool, several: bool):
    assert weighs_classes(choice, multi_label=False) is one
    assert weighs_classes(choice, multi_label=True) is several


def test_balanced_weights_smoothing_r_drop_and_adapters_train_too(tmp_path: Path, home: Path):
    stages = toy(
        tmp_path,
        rows=60,
        epochs=1,
        class_weights="balanced",
        label_smoothing=0.1,
        r_drop=0.5,
        dropout=0.1,
        method="lora",
        pooling="attention",
        formats=("auto",),
    )
    assert opened(stages.finetune, home).load().multi_label
