"""A packed classifier needs nothing of this project, holds no pickle, and says what the model itself says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.mlflow_client import quiet
from jobs.mlflow_models import pack_classifier

LABELS = ["calm", "angry", "sad"]
TEXTS = ["the cat sat", "mat", "the cat sat on the mat and the cat sat on the mat again and again and again", ""]
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
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier as an export stage leaves it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForSequenceClassification

    words = ["[pad]", "[eos]", "[unk]", "the", "cat", "sat", "on", "mat", "and", "again"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A [eos]", special_tokens=[("[eos]", 1)])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        pad_token_id=0,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    folder = tmp_path_factory.mktemp("export")
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "manifest.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def packed(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quiet()
    target = tmp_path_factory.mktemp("packed") / "model"
    pack_classifier(export, target)
    return target


def probabilities_alone(export: Path, text: str) -> dict[str, float]:
    """What transformers says of one text by itself, without any padding."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForSequenceClassification

    ids = Tokenizer.from_file(str(export / "tokenizer.json")).encode(text).ids
    ids = ids if len(ids) <= 12 else [*ids[:11], ids[-1]]
    model = AutoModelForSequenceClassification.from_pretrained(export).eval()
    with torch.no_grad():
        row = model(input_ids=torch.tensor([ids])).logits[0].softmax(-1).tolist()
    return dict(zip(LABELS, row, strict=True))


def test_a_packed_classifier_is_files_and_code_without_pickle(packed: Path) -> None:
    names = {path.name for path in packed.rglob("*") if path.is_file()}
    assert {"MLmodel", "requirements.txt", "pyfunc_classifier.py", "config.json", "model.safetensors"} <= names
    assert "manifest.json" not in names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
    assert "python_model.pkl" not in (packed / "MLmodel").read_text()
    assert "torch==" in (packed / "requirements.txt").read_text()


@pytest.mark.slow
def test_a_packed_classifier_predicts_where_this_project_is_not_installed(
    export: Path, packed: Path, tmp_path: Path
) -> None:
    repository = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-I", "-c", READER, str(packed), json.dumps(TEXTS), repository]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout)
    assert len(predictions) == len(TEXTS)
    for text, prediction in zip(TEXTS, predictions, strict=True):
        expected = probabilities_alone(export, text)
        assert prediction["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert prediction["label"] == max(expected, key=lambda label: expected[label])
