"""A classifier that reads long texts in windows says the same of a text wherever it is asked."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.predict_files import Order, predict_file
from jobs.pyfunc_classifier import Network, TextClassifier
from jobs.scoring import scorer
from jobs.use import predict
from pipeline import export, metrics
from pipeline.classify import probabilities
from pipeline.weights import ClassifierFiles
from pipeline.windows import Windows
from tests.pipeline.toy_export import LABELS, classifier_folder, subject_of

TEMPERATURE = 1.7
TEXTS = ["the cat sat", "the cat sat on the mat and " * 9, "", "<|eos|> a dog", "a dog ran " * 90, "why is it so " * 7]
FORMATS = {
    "hf": {"pooling": "last"},
    "onnx": {"pooling": "attention"},
    "onnx-several": {"multi_label": True},
    "onnx-ngrams": {"pooling": "mean", "ngrams": 3},
}
"""Formats that are registered, and what kind of classifier is in it."""


@pytest.fixture(scope="module", params=FORMATS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier before calibration, in a folder beside its export."""
    root, kind = tmp_path_factory.mktemp(request.param), FORMATS[request.param]
    files = classifier_folder(root / "artifact", n_layers=1, windows=Windows(3, 4), **kind)
    (root / "export").mkdir()
    export.load(request.param.split("-")[0]).write(root / "export", subject_of(files, TEMPERATURE)[0])
    return files


@pytest.fixture
def folder(artifact: Path) -> str:
    return str(artifact.parent / "export")


@pytest.fixture
def wanted(artifact: Path) -> np.ndarray:
    """What an evaluation reports: the probabilities of the logits over the temperature."""
    classifier = ClassifierFiles(artifact).load()
    table = probabilities(classifier, TEXTS).astype(np.float64)
    return metrics.with_temperature(table, TEMPERATURE, multi_label=classifier.model.head.multi_label)


def rows(predictions: list[Any]) -> np.ndarray:
    return np.array([[prediction["probabilities"][label] for label in LABELS] for prediction in predictions])


def test_predictions_scores_and_files_are_those_of_the_evaluation(folder: str, wanted: np.ndarray, tmp_path: Path):
    assert np.abs(rows(predict(folder, TEXTS)) - wanted).max() < 1e-5
    assert np.abs(scorer(export.read(Path(folder)).loaded, "fp32")(TEXTS) - wanted).max() < 1e-5
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    predict_file(Order(model=folder, input=str(tmp_path / "a.jsonl"), probabilities=True))
    labelled = [json.loads(line) for line in (tmp_path / "a.predictions.jsonl").read_text().splitlines()]
    assert np.abs(np.array([[row[f"p_{label}"] for label in LABELS] for row in labelled]) - wanted).max() < 1e-5


def test_so_are_those_of_the_model_behind_mlflow(folder: str, wanted: np.ndarray):
    registered = TextClassifier()
    registered.load_context(SimpleNamespace(artifacts={"classifier": folder}))  # pyright: ignore[reportArgumentType]
    assert np.abs(rows(registered.predict(TEXTS)) - wanted).max() < 1e-5
    assert np.abs(rows([registered.predict([text])[0] for text in TEXTS]) - wanted).max() < 1e-5
    assert registered.predict([]) == []


@given(st.integers(3, 20), st.integers(1, 6), st.integers(0, 17), st.integers(0, 120))
def test_mlflow_cuts_a_text_as_we_do(seq_len: int, count: int, overlap: int, n: int):
    windows = Windows(count, overlap if count > 1 else 0)
    if windows.refusal(seq_len) is not None:
        return
    registered = TextClassifier()
    noted = {"count": windows.count, "overlap": windows.overlap}
    registered.network = Network(lambda ids, mask: ids, LABELS, seq_len, 0, noted, multi_label=False)
    text = np.arange(n + 2, dtype=np.int32)
    assert registered._windows(text.tolist()) == [ids.tolist() for ids in windows.cut(text, seq_len)]
