"""A classifier that may give a text several labels, or none, at work: every way to use it gives the same answers."""

import asyncio
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit, logit

from jobs import pyfunc_classifier
from jobs.assess import compare_models, evaluate_model
from jobs.batching import Batcher
from jobs.cli import app
from jobs.labelled import Columns
from jobs.predict_files import Order, predict_file
from jobs.scoring import scorer
from jobs.serve import create_app
from jobs.use import NO_LABEL, predict
from pipeline import export
from pipeline.classify import probabilities
from pipeline.errors import DataError, UsageError
from tests.pipeline.toy_export import LABELS, WORDS, classifier_folder, subject_of

TEMPERATURE = 1.7
TEXTS = [*WORDS, "the cat sat", "Mat", "", "the hill and far away " * 9, "<|eos|> a dog", "why why why"]
URI = "sqlite:///nowhere.db"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_folder(tmp_path_factory.mktemp("classifier") / "artifact", multi_label=True, seed=4)


@pytest.fixture(scope="module")
def expected(artifact: Path) -> np.ndarray:
    """What an evaluation reports: the sigmoid of each logit over the temperature."""
    table = probabilities(subject_of(artifact, 1.0)[1], TEXTS)
    assert table.dtype == np.float64
    return expit(logit(table) / TEMPERATURE)


@pytest.fixture(scope="module", params=["hf", "onnx"])
def model(request: pytest.FixtureRequest, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export."""
    folder = tmp_path_factory.mktemp(request.param)
    export.load(request.param).write(folder, subject_of(artifact, TEMPERATURE)[0])
    return folder


def chosen(row: np.ndarray) -> list[str]:
    return [label for label, p in zip(LABELS, row, strict=True) if p >= 0.5]


def check(answers: list[dict[str, Any]], expected: np.ndarray) -> None:
    for answer, row in zip(answers, expected, strict=True):
        assert answer["labels"] == chosen(row)
        assert "label" not in answer
        assert answer["probabilities"] == pytest.approx(dict(zip(LABELS, row.tolist(), strict=True)), abs=1e-5)


def test_the_texts_of_these_tests_get_none_one_and_several_labels(expected: np.ndarray):
    assert len({len(chosen(row)) for row in expected}) >= 3
    assert np.abs(expected - 0.5).min() > 1e-4


def test_texts_get_every_label_that_is_at_least_as_likely_as_not(model: Path, expected: np.ndarray):
    answers = predict(str(model), TEXTS)
    check(answers, expected)
    assert [answer["text"] for answer in answers] == TEXTS


def test_the_model_behind_mlflow_gives_the_same(model: Path, expected: np.ndarray):
    behind = pyfunc_classifier.TextClassifier()

    class Context:
        artifacts = {pyfunc_classifier.ARTIFACT: str(model)}  # noqa: RUF012

    behind.load_context(Context())  # pyright: ignore[reportArgumentType]
    check(behind.predict(TEXTS), expected)


def test_a_served_model_gives_the_same(model: Path, expected: np.ndarray):
    loaded = export.read(model).loaded

    async def asked() -> list[Any]:
        batcher = Batcher(scorer(loaded, "fp32"), 64, 0.001)
        served = create_app(batcher, loaded.labels, 1 << 20, multi_label=loaded.multi_label)
        async with batcher.running():
            return [await posted(served, texts) for texts in ([], TEXTS)]

    nothing, answers = asyncio.run(asked())
    assert nothing == {"predictions": []}
    check(answers["predictions"], expected)


async def posted(served: Any, texts: list[str]) -> Any:
    """What a request to /invocations is answered."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps({"inputs": texts}).encode(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b"", "headers": headers}
    await served(scope, receive, send)
    return json.loads(b"".join(message.get("body", b"") for message in sent))


def labelled(path: Path, model: Path, **order: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of a file of TEXTS with what the model says, and the result of the command."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    else:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([["text", "n"], *([text, i] for i, text in enumerate(TEXTS))])
    result = predict_file(Order(model=str(model), input=str(path), **order))
    out = Path(result["output"])
    if path.suffix == ".parquet":
        return pq.read_table(out).to_pylist(), result
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text().splitlines()], result
    with out.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")), result


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv", "tsv"])
def test_files_get_a_list_or_a_string_where_they_have_no_lists(
    model: Path, expected: np.ndarray, tmp_path: Path, suffix: str
):
    rows, result = labelled(tmp_path / f"a.{suffix}", model, separator=";", probabilities=True)
    for row, wanted in zip(rows, expected, strict=True):
        assert row["label"] == (";".join(chosen(wanted)) if isinstance(row["label"], str) else chosen(wanted))
        assert float(row["confidence"]) == pytest.approx(np.maximum(wanted, 1 - wanted).prod(), abs=1e-4)
        assert float(row[f"p_{LABELS[0]}"]) == pytest.approx(wanted[0], abs=1e-5)
    assert isinstance(rows[0]["label"], list) == (suffix in ("jsonl", "parquet"))
    assert result["labels"] == dict(zip(LABELS, (expected >= 0.5).sum(axis=0).tolist(), strict=True))


def test_a_separator_that_is_in_a_label_is_refused(model: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="--separator 'b' is a part of the label '<b>'"):
        labelled(tmp_path / "a.csv", model, separator="b")
    assert not list(tmp_path.glob("*.predictions.csv"))


@pytest.fixture
def data(expected: np.ndarray, tmp_path: Path) -> Path:
    """TEXTS with the labels that the model gives them, but for the first row."""
    path = tmp_path / "data.csv"
    rows = [[text or "x", "|".join(chosen(row))] for text, row in zip(TEXTS, expected, strict=True)]
    rows[0][1] = LABELS[0] if rows[0][1] != LABELS[0] else LABELS[1]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    return path


def test_a_model_is_measured_on_rows_with_several_labels(model: Path, data: Path, tmp_path: Path):
    found = evaluate_model(
        str(model), data, home=tmp_path, uri=URI, columns=Columns(separator="|"), report=tmp_path / "report"
    )
    assert found["multi_label"] is True
    assert found["accuracy"] == pytest.approx(1 - 1 / len(TEXTS), abs=0.12)  # the empty text was changed too
    assert found["micro_f1"] > 0.6
    assert found["temperature"] == TEMPERATURE
    assert found["confusions"] is None
    assert "Micro-F1" in (tmp_path / "report" / "report.html").read_text()


def test_two_models_are_compared_by_whole_answers_and_two_kinds_are_not(
    model: Path, data: Path, tmp_path: Path, artifact: Path
):
    other = classifier_folder(tmp_path / "other", multi_label=True, seed=5)
    columns = Columns(separator="|")
    found = compare_models(str(model), str(other), data, home=tmp_path, uri=URI, columns=columns, resamples=200)
    assert found["delta"] == pytest.approx(found["macro_f1_a"] - found["macro_f1_b"], abs=2e-6)
    assert found["accuracy_a"] > found["accuracy_b"]
    assert 0 < found["mcnemar_p"] <= 1
    single = classifier_folder(tmp_path / "single")
    with pytest.raises(DataError, match=r"may give a text several classes.*Compare models of one kind"):
        compare_models(str(single), str(model), data, home=tmp_path, uri=URI, columns=columns)


def test_labels_that_the_model_does_not_know_are_named(model: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": ["calm"]}\n{"text": "y", "label": ["calm", "odd"]}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: .* does not know the class 'odd' \(1 rows\)"):
        evaluate_model(str(model), tmp_path / "a.jsonl", home=tmp_path, uri=URI)
    single = classifier_folder(tmp_path / "single")
    with pytest.raises(DataError, match=r"a\.jsonl:1: label is \['calm'\]: not a class.*set labels\.multi_label"):
        evaluate_model(str(single), tmp_path / "a.jsonl", home=tmp_path, uri=URI)


def test_a_person_reads_labels_and_scores(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path))
    for words, parts in {
        ("evaluate", str(model), str(data), "--separator", "|"): ("micro-F1", "accuracy", "weakest classes"),
        ("predict", str(model), *TEXTS[:3]): (NO_LABEL, ", ", "0.", TEXTS[2]),
    }.items():
        app(list(words), exit_on_error=False, result_action="return_value")
        said = capsys.readouterr().out
        assert all(part in said for part in parts), said


def test_llama_cpp_gives_the_same_logits(artifact: Path, tmp_path: Path):
    subject, loaded = subject_of(artifact, TEMPERATURE)
    wanted = export.expected(loaded, [text for text in TEXTS if text], TEMPERATURE)
    assert export.export("gguf", tmp_path, subject, wanted, 1e-5) < 1e-5
    assert json.loads((tmp_path / "classifier.json").read_text())["multi_label"] is True
