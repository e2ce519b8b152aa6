"""One model measured on labelled texts, and two on the same: what programs get, and what a person sees."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.assess import compare_models, evaluate_model
from jobs.cli import app
from jobs.labelled import Columns, read_labelled
from pipeline import export
from pipeline.classify import probabilities
from pipeline.errors import DamagedArtifact, DataError, EnvironmentProblem, UsageError
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.export import Export, ExportConfig
from pipeline.stages.labels import LabelsStage
from pipeline.store import Store
from pipeline.weights import ClassifierFiles
from tests.pipeline.data_stages import made, opened
from tests.pipeline.toy_classifier import RandomClassifier, evaluate_of, labels_of

URI = "sqlite:///nowhere.db"


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> LabelsStage:
    return labels_of(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def data(labels: LabelsStage) -> Path:
    return Path(labels.config.path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def evaluation(labels: LabelsStage) -> Evaluate:
    return evaluate_of(labels, baselines=(), contamination=False, bootstrap=1000)


@pytest.fixture(scope="module")
def model(evaluation: Evaluate, labels: LabelsStage, home: Path) -> str:
    """An export of a run, its temperature folded in."""
    stage = Export(config=ExportConfig(), classifier=evaluation.classifier, labels=labels, evaluation=evaluation)
    return str(Store(home).open("export", made(stage, home).key))


@pytest.fixture(scope="module")
def other(labels: LabelsStage, home: Path) -> str:
    """Another classifier of the same labels, known to no evaluation."""
    stage = RandomClassifier(labels=labels, seed=7)
    return str(Store(home).open(stage.kind, made(stage, home).key))


def evaluated(model: str, data: Path, home: Path, **more: Any) -> dict[str, Any]:
    return evaluate_model(model, data, home=home, uri=URI, **more)


def compared(a: str, b: str, data: Path | None, home: Path, **more: Any) -> dict[str, Any]:
    return compare_models(a, b, data, home=home, uri=URI, resamples=500, **more)


def test_a_model_on_its_own_test_rows_has_the_scores_of_its_evaluation(
    model: str, data: Path, home: Path, evaluation: Evaluate
):
    result, scores = evaluated(model, data, home), opened(evaluation, home).scores
    assert (result["n"], result["split"], result["temperature"]) == (60, "test", scores["temperature"])
    for name in ("accuracy", "macro_f1", "accuracy_ci", "macro_f1_ci", "ece", "log_loss", "brier", "roc_auc"):
        assert result[name] == pytest.approx(scores[name], abs=2e-4), name
    for name in ("ece", "log_loss", "brier"):
        assert result[f"{name}_calibrated"] == pytest.approx(scores["calibrated"][name], abs=2e-4)
    assert result["ece_calibrated"] < result["ece"]
    assert [row["name"] for row in result["per_class"]] == [row["name"] for row in scores["per_class"]]
    assert result["seconds"] > 0
    json.dumps(result)


def evaluated_after(labels: LabelsStage, home: Path) -> str:
    """A classifier that has learned from these labels, and was evaluated."""
    stage = replace(
        evaluate_of(labels, baselines=(), contamination=False), classifier=RandomClassifier(labels=labels, seed=9)
    )
    made(stage, home)
    return str(Store(home).open("randomclassifier", made(stage.classifier, home).key))


def test_models_are_not_compared_on_texts_that_one_has_learned_from(model: str, labels: LabelsStage, home: Path):
    drawn = LabelsStage(config=replace(labels.config, split=(0.5, 0.2, 0.3)))
    ours, theirs = opened(labels, home).split("test").texts, opened(drawn, home)
    known = {text for split in ("train", "validation") for text in theirs.split(split).texts}
    left_out = sum(text in known for text in ours)
    found = compared(model, evaluated_after(drawn, home), None, home)
    assert (found["n"], found["left_out"]) == (60 - left_out, left_out)
    assert 0 < left_out < 60
    assert compared(model, model, None, home)["left_out"] == 0


def test_models_without_a_text_that_is_new_to_both_are_not_compared(
    model: str, labels: LabelsStage, home: Path, tmp_path: Path
):
    rows = [json.loads(line) for line in Path(labels.config.path).read_text().splitlines()]
    other_way = {"train": "test", "test": "train", "validation": "validation"}
    swapped = tmp_path / "swapped.jsonl"
    swapped.write_text("".join(json.dumps({**row, "split": other_way[row["split"]]}) + "\n" for row in rows))
    other = evaluated_after(LabelsStage(config=replace(labels.config, path=str(swapped))), home)
    with pytest.raises(UsageError, match=r"has learned from each of the 60 texts .* --data FILE"):
        compared(model, other, None, home)


def test_a_model_with_a_damaged_file_answers_nothing(model: str, data: Path, home: Path, tmp_path: Path):
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "README.md").write_text("A card that somebody wrote.")
    assert evaluated(str(copy), data, home)["n"] == 60
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(DamagedArtifact, match=r"model\.safetensors: damaged"):
        evaluated(str(copy), data, home)


def test_rows_are_chosen_by_split_and_columns_by_name(model: str, data: Path, home: Path, tmp_path: Path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    assert evaluated(model, data, home, columns=Columns(split="all"))["n"] == 240
    assert evaluated(model, data, home, columns=Columns(split="dev"))["n"] == 60
    table = tmp_path / "rows.csv"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["body", "kind"], *([row["text"], row["label"]] for row in rows[:20]), [" ", "fruit"]]
        )
    result = evaluated(model, table, home, columns=Columns(text="body", label="kind"))
    assert (result["n"], result["split"], result["blank"]) == (20, "all", 1)


def test_a_class_that_the_model_does_not_know_is_named_with_its_place(model: str, home: Path, tmp_path: Path):
    bad = tmp_path / "bad.jsonl"
    rows = [("pear", "fruit"), ("oak", "tree"), ("fig", "fruit"), ("ant", "insect"), ("elm", "tree")]
    bad.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    with pytest.raises(DataError) as caught:
        evaluated(model, bad, home)
    message = str(caught.value)
    assert message.startswith(f"{bad}:2: ")
    for part in ("'tree'", "'insect'", "(3 rows)", "'metal'"):
        assert part in message


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (Columns(split="holdout"), r"no labelled text of the split 'holdout' in it. There are: train \(120\)"),
        (Columns(text="body"), "1: no column 'body'"),
        (Columns(label="text2"), "1: no column 'text2'"),
    ],
    ids=["split", "text", "label"],
)
def test_what_is_not_in_the_file_is_said(data: Path, columns: Columns, message: str):
    with pytest.raises(DataError, match=message):
        read_labelled(data, columns)


def test_a_split_asked_of_a_file_without_that_column_is_refused(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(DataError, match="no column 'split'"):
        read_labelled(tmp_path / "x.jsonl", Columns(split="test"))


def test_files_that_are_named_after_splits_are_told_apart(tmp_path: Path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.csv").write_text(f"text,label\n{name} text,a\n")
    assert read_labelled(folder, Columns()).texts == ["test text"]
    assert read_labelled(folder, Columns(split="train")).texts == ["train text"]
    assert read_labelled(folder, Columns(split="all")).texts == ["test text", "train text"]
    assert read_labelled(folder / "train.csv", Columns()).texts == ["train text"]


def test_of_a_saved_dataset_with_splits_the_test_rows_are_taken(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {name: datasets.Dataset.from_dict({"text": [name], "label": ["a"]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read_labelled(tmp_path / "saved", Columns()).texts == ["test"]


def test_the_report_is_whole_and_leaves_other_files_alone(model: str, data: Path, home: Path, tmp_path: Path):
    target = tmp_path / "report"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    (target / "report.html").write_text("old")
    result = evaluated(model, data, home, report=target)
    page = (target / "report.html").read_text()
    assert result["report"] == str(target / "report.html")
    assert f"on {data.name}" in page
    assert "Beside what it must beat" not in page
    assert (target / "notes.txt").read_text() == "mine"
    assert {"roc.png", "scores.json", "predictions.parquet"} <= {path.name for path in target.iterdir()}
    assert not list(target.glob(".tmp-*"))
    with pytest.raises(UsageError, match="this is a file"):
        evaluated(model, data, home, report=target / "notes.txt")
    with pytest.raises(EnvironmentProblem, match="cannot be written: Not a directory"):
        evaluated(model, data, home, report=target / "notes.txt" / "deep")


def test_a_model_compared_with_itself_leads_by_nothing(model: str, data: Path, home: Path):
    result = compared(model, model, data, home)
    assert (result["delta"], result["ci"], result["p_value"], result["mcnemar_p"]) == (0, [0, 0], 1.0, 1.0)
    assert result["better"] is None
    assert "the same macro-F1" in result["verdict"]


def test_a_comparison_is_a_less_b_on_the_same_rows(model: str, other: str, data: Path, home: Path):
    one, two = compared(model, other, data, home), compared(other, model, data, home)
    assert one["n"] == two["n"] == 60
    assert one["delta"] == pytest.approx(one["macro_f1_a"] - one["macro_f1_b"], abs=2e-6)
    assert one["delta"] == -two["delta"]
    assert (one["macro_f1_a"], one["accuracy_a"]) == (two["macro_f1_b"], two["accuracy_b"])
    low, high = one["ci"]
    assert low <= one["delta"] <= high
    assert one["mcnemar_p"] == two["mcnemar_p"]
    assert one["better"] in (model, other)
    assert one["by_chance"] == (low <= 0 <= high)
    assert ("may be chance" in one["verdict"]) == one["by_chance"]
    json.dumps(one)


def test_a_trained_model_beats_one_that_is_not(other: str, home: Path, labels: LabelsStage, tmp_path: Path):
    """Labels that are what one model says: it is right everywhere."""
    loaded = ClassifierFiles(Path(other)).load()
    texts = [json.loads(line)["text"] for line in Path(labels.config.path).read_text().splitlines()]
    says = probabilities(loaded, texts).argmax(axis=1)
    rows = [{"text": text, "label": loaded.labels[said]} for text, said in zip(texts, says, strict=True)]
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, rows)))
    third = RandomClassifier(labels=labels, seed=11)
    rival = str(Store(home).open(third.kind, made(third, home).key))
    result = compared(other, rival, tmp_path / "said.jsonl", home)
    assert result["macro_f1_a"] == 1.0
    assert (result["better"], result["by_chance"]) == (other, False)
    assert result["p_value"] < 0.01
    assert result["mcnemar_p"] < 1e-6
    assert "is better than" in result["verdict"]


def test_without_data_the_test_split_of_the_first_model_is_found_by_its_weights(
    model: str, other: str, home: Path, evaluation: Evaluate, tmp_path: Path
):
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    (copy / "manifest.json").unlink()
    unexported = opened(evaluation.classifier, home).path
    for name in (model, str(copy), str(unexported)):
        result = compared(name, other, None, home)
        assert result["n"] == 60
        assert result["data"].endswith("predictions.parquet")
    with pytest.raises(UsageError, match="--data FILE"):
        compared(other, model, None, home)


def test_models_of_other_classes_are_not_compared(model: str, other: str, data: Path, home: Path, tmp_path: Path):
    loaded = ClassifierFiles(Path(other)).load()
    renamed = replace(loaded, labels=["a", "b", "c"])
    subject = export.Subject(renamed, Path(other) / "tokenizer.json", 1.0)
    export.load("hf").write(tmp_path / "renamed", subject)
    with pytest.raises(DataError, match=r"renamed does not know the class"):
        compared(model, str(tmp_path / "renamed"), data, home)


Run = Callable[..., Any]


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("GRISTMILL_HOME", str(home))

    def command(*arguments: str) -> str:
        app(list(arguments), exit_on_error=False, result_action="return_value")
        return capsys.readouterr().out

    return command


def test_the_commands_end_with_one_line_of_json(run: Run, model: str, other: str, data: Path):
    result = json.loads(run("evaluate", model, str(data), "--split", "test", "--json").splitlines()[-1])
    contract = {"accuracy", "macro_f1", "per_class", "ece", "ece_calibrated", "log_loss", "n", "seconds"}
    assert contract <= result.keys()
    found = json.loads(run("compare", model, other, "--resamples", "200", "--json").splitlines()[-1])
    contract = {"delta", "ci", "p_value", "n", "macro_f1_a", "macro_f1_b", "accuracy_a", "accuracy_b", "mcnemar_p"}
    assert contract <= found.keys()


def test_a_person_reads_scores_and_a_sentence(run: Run, model: str, other: str, data: Path):
    said = run("evaluate", model, str(data))
    for part in ("60 texts", "accuracy", "macro-F1", "before calibration", "weakest classes", "texts/s"):
        assert part in said
    said = run("compare", model, other, "--data", str(data))
    assert "macro-F1" in said
    assert "McNemar" in said


def test_intervals_depend_on_the_seed_alone(run: Run, model: str, data: Path):
    first, again, others = (
        json.loads(run("evaluate", model, str(data), "--seed", seed, "--json").splitlines()[-1])
        for seed in ("1", "1", "2")
    )
    assert first["accuracy_ci"] == again["accuracy_ci"]
    assert np.abs(np.subtract(first["accuracy_ci"], others["accuracy_ci"])).max() < 0.1
    assert first["accuracy"] == others["accuracy"]
