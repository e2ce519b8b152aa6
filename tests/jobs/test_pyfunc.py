"""A packed classifier needs nothing of this project, holds no pickle, and says what the evaluation reported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.mlflow_client import quiet
from jobs.mlflow_models import pack_classifier
from pipeline import export
from pipeline.classify import probabilities
from pipeline.text import normalise
from tests.pipeline.toy_export import LABELS, classifier_folder, subject_of

TEMPERATURE = 1.7
TEXTS = [
    "the cat sat",
    "Mat",
    "the cat sat on the mat and " * 9,
    "",
    "<|eos|> a dog",
    "\u00e9t\u00e9",
    "the\r\ncat\rsat\0here",
]
FORMATS = {"hf": "last", "onnx": "attention"}
"""Formats that are registered, and the pooling of the classifier in it."""

READER = """
import importlib, json, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path = [path for path in sys.path if path != sys.argv[3] and "editable" not in path]
for name in ("jobs", "pipeline", "model"):
    try:
        importlib.import_module(name)
        sys.exit(f"{name} can be imported here")
    except ImportError:
        pass
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict(json.loads(sys.argv[2]))))
ours = [name for name in sys.modules if name.split(".")[0] in ("jobs", "pipeline", "model", "gristmill")]
sys.exit(f"{ours} were imported" if ours else 0)
"""


@pytest.fixture(scope="module", params=FORMATS)
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier before calibration, in a folder beside its packed export."""
    root = tmp_path_factory.mktemp(request.param)
    files = classifier_folder(root / "artifact", pooling=FORMATS[request.param], n_layers=1)
    (root / "export").mkdir()
    export.load(request.param).write(root / "export", subject_of(files, TEMPERATURE)[0])
    (root / "export" / "manifest.json").write_text("{}")
    quiet()
    pack_classifier(root / "export", root / "packed")
    return files


def calibrated(artifact: Path) -> list[list[float]]:
    """What an evaluation reports: the softmax of log p over the temperature."""
    table = torch.from_numpy(probabilities(subject_of(artifact, 1.0)[1], [normalise(text) for text in TEXTS]))
    return (table.log() / TEMPERATURE).softmax(-1).tolist()


def test_a_packed_classifier_is_files_and_code_without_pickle(artifact: Path) -> None:
    packed = artifact.parent / "packed"
    names = {path.name for path in packed.rglob("*") if path.is_file()}
    assert {"MLmodel", "requirements.txt", "pyfunc_classifier.py", "model.safetensors"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
    assert "python_model.pkl" not in (packed / "MLmodel").read_text()
    needs = (packed / "requirements.txt").read_text()
    assert ("torch==" in needs) != ("onnxruntime==" in needs)


@pytest.mark.slow
def test_a_packed_classifier_gives_calibrated_probabilities_where_this_project_is_not_installed(
    artifact: Path, tmp_path: Path
) -> None:
    repository = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-I", "-c", READER, str(artifact.parent / "packed"), json.dumps(TEXTS), repository]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout)
    assert len(predictions) == len(TEXTS)
    for prediction, row in zip(predictions, calibrated(artifact), strict=True):
        expected = dict(zip(LABELS, row, strict=True))
        assert prediction["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert prediction["label"] == max(expected, key=lambda label: expected[label])
