"""A classifier goes from the registry's name to another program's format; nothing of anybody else's is replaced."""

import json
from pathlib import Path

import pytest

from jobs.export_model import export_model
from jobs.mlflow_client import default_uri
from jobs.track_mlflow import sync
from pipeline import export
from pipeline.errors import EnvironmentProblem, UsageError
from tests.jobs.conftest import Corpus, Export, Pretrain, run_in
from tests.pipeline.toy_export import LABELS, classifier_folder, subject_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("classifier")
    files = classifier_folder(root / "artifact")
    (root / "export").mkdir()
    export.load("hf").write(root / "export", subject_of(files, 1.7)[0])
    return root / "export"


@pytest.fixture(autouse=True)
def _home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", default_uri(home))


def test_a_registered_name_is_enough(folder: Path, home: Path, tmp_path: Path) -> None:
    pipeline = [Export(base=Pretrain(corpus=Corpus(), steps=2), files=str(folder))]
    sync(home, run_in(home, pipeline, "plan", "clf").run, default_uri(home))
    result = export_model("clf", "gguf", tmp_path / "out", force=False)
    assert result["program"] == "llama.cpp"
    assert result["difference"] < 1e-5
    assert result["calibration_temperature"] == 1.7
    assert result["files"] == ["classifier.json", "model.gguf"]
    assert json.loads((tmp_path / "out" / "classifier.json").read_text())["labels"] == LABELS


def test_hf_from_hf_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    export_model(str(folder), "hf", tmp_path / "out", force=False)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_only_an_export_is_ever_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="this is no export, so it is not replaced"):
        export_model(str(folder), "hf", tmp_path / "mine", force=True)
    (tmp_path / "out").mkdir()
    export_model(str(folder), "hf", tmp_path / "out", force=False)
    with pytest.raises(UsageError, match="there is an export already"):
        export_model(str(folder), "hf", tmp_path / "out", force=False)
    export_model(str(folder), "gguf", tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "config.json").exists()
    assert {path.name for path in tmp_path.iterdir()} >= {"mine", "out"}
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_place_that_cannot_be_written_is_one_message(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="file/deep/out: cannot be written: Not a directory"):
        export_model(str(folder), "hf", tmp_path / "file" / "deep" / "out", force=False)


def test_what_a_format_cannot_express_is_refused(folder: Path, tmp_path: Path) -> None:
    mean = classifier_folder(tmp_path / "mean", pooling="mean")
    for name in ("hf", "gguf"):
        with pytest.raises(UsageError, match=rf"finetune\.pooling=mean .* cannot be exported as {name}"):
            export_model(str(mean), name, tmp_path / "out", force=False)
    with pytest.raises(UsageError, match="--format tflite: there are gguf, hf, onnx"):
        export_model(str(folder), "tflite", tmp_path / "out", force=False)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_names_the_extra(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.load("gguf"), "PACKAGES", ("gguf", "no_such_package"))
    with pytest.raises(EnvironmentProblem, match=r"needs no_such_package.* pip install 'gristmill\[gguf\]'"):
        export_model(str(folder), "gguf", tmp_path / "out", force=False)
