"""What a run hands over: the classifier as it was evaluated, calibrated, in every format asked for, with its card."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from pipeline import export
from pipeline.bpe import TokenizerConfig
from pipeline.classify import probabilities
from pipeline.errors import StageFailed, UsageError
from pipeline.export import compare, expected
from pipeline.runner import Built
from pipeline.stages.evaluate import Evaluate, Evaluation
from pipeline.stages.export import Export, ExportConfig
from pipeline.stages.finetune import Finetune, FinetuneConfig
from pipeline.stages.labels import LabelsStage
from pipeline.stages.tokenizer import TokenizerStage
from pipeline.store import Store
from pipeline.weights import ClassifierFiles, LoadedClassifier
from tests.pipeline.data_stages import corpus_of, made
from tests.pipeline.recipes import SIMPLE
from tests.pipeline.toy_classifier import RandomClassifier, evaluate_of, labels_of
from tests.pipeline.toy_export import classifier_folder, subject_of

TEXTS = ["apple", "iron zinc and tin", "one two three four one two three four one two", "<|eos|> pear"]


def export_of(evaluation: Evaluate, **config: Any) -> Export:
    return Export(
        config=ExportConfig(**config),
        classifier=evaluation.classifier,
        labels=evaluation.labels,
        evaluation=evaluation,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> LabelsStage:
    return labels_of(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def built(labels: LabelsStage, home: Path) -> Built:
    return made(export_of(evaluate_of(labels, random_init=True), language="en"), home)


def input_of(home: Path, built: Built, name: str, kind: str) -> Path:
    manifest = Store(home).find("export", built.key)
    assert manifest
    return Store(home).path(kind, manifest.meta["input_keys"][name]["key"])


@pytest.fixture(scope="module")
def folder(home: Path, built: Built) -> Path:
    return Store(home).open("export", built.key)


@pytest.fixture(scope="module")
def loaded(home: Path, built: Built) -> LoadedClassifier:
    return ClassifierFiles(input_of(home, built, "classifier", "randomclassifier")).load()


@pytest.fixture(scope="module")
def evaluation(home: Path, built: Built) -> Evaluation:
    return Evaluation(input_of(home, built, "evaluation", "evaluate"))


def test_the_folder_is_a_stock_classifier(folder: Path, built: Built):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "a|b <i>_", "1": "fruit", "2": "metal"}
    assert "auto_map" not in config
    assert not list(folder.glob("*.py"))
    assert built.notes["model"] == {"role": "classifier"}
    assert built.notes["files"] == ["README.md"]
    assert built.notes["metrics"]["export/logit_difference"] < 1e-5


def test_the_export_gives_the_calibrated_probabilities_of_the_evaluation(folder: Path, evaluation: Evaluation):
    temperature = evaluation.scores["temperature"]
    assert temperature != 1
    assert json.loads((folder / "config.json").read_text())["calibration_temperature"] == temperature
    rows = pq.read_table(evaluation.path / "predictions.parquet")
    ours = probabilities(export.read(folder).loaded, rows.column("text").to_pylist())
    assert np.abs(ours - np.array(rows.column("probabilities").to_pylist())).max() < 1e-5


def test_the_head_alone_is_divided_by_the_temperature(folder: Path, loaded: LoadedClassifier, evaluation: Evaluation):
    ours, theirs = dict(loaded.model.named_parameters()), dict(export.read(folder).loaded.model.named_parameters())
    for name, parameter in ours.items():
        wanted = parameter / evaluation.scores["temperature"] if name == "head.score.weight" else parameter
        assert torch.equal(theirs[name], wanted)


def test_transformers_pipeline_gives_our_labels(folder: Path, loaded: LoadedClassifier, evaluation: Evaluation):
    from transformers import pipeline

    theirs = pipeline("text-classification", model=str(folder))(TEXTS, truncation=True)
    table = torch.from_numpy(probabilities(loaded, TEXTS))
    ours = (table.log() / evaluation.scores["temperature"]).softmax(-1)
    assert [row["label"] for row in theirs] == [loaded.labels[i] for i in ours.argmax(dim=1)]
    assert [row["score"] for row in theirs] == pytest.approx(ours.amax(dim=1).tolist(), abs=1e-5)


@pytest.mark.slow
def test_transformers_loads_the_folder_without_a_warning(folder: Path):
    script = """
import sys
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model, info = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], output_loading_info=True)
AutoTokenizer.from_pretrained(sys.argv[1])
assert model.config.calibration_temperature != 1
assert not any(info.values()), info
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not re.search("warn|unused|unexpected|not used", done.stderr, re.IGNORECASE), done.stderr


@pytest.mark.parametrize("weight", ["score.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_changed_weight_is_found_and_its_size_told(
    folder: Path, loaded: LoadedClassifier, evaluation: Evaluation, tmp_path: Path, weight: str
):
    copy = _copy(folder, tmp_path)
    weights = load_file(copy / "model.safetensors")
    weights[weight] = weights[weight] * 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    wanted = expected(loaded, TEXTS, evaluation.scores["temperature"])
    with pytest.raises(StageFailed, match=r"differ by up to \d\.\d+e-0\d, more than .*export\.tolerance=1e-05"):
        compare("transformers", export.load("hf").logits(copy, wanted), wanted, 1e-5)


def test_a_changed_tokenizer_is_found(folder: Path, loaded: LoadedClassifier, tmp_path: Path):
    copy = _copy(folder, tmp_path)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": False}))
    with pytest.raises(StageFailed, match=r"transformers reads '<\|eos\|> pear' as"):
        export.load("hf").logits(copy, expected(loaded, TEXTS))


def test_verification_leaves_the_matmul_precision_as_it_was(loaded: LoadedClassifier):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        expected(loaded, TEXTS)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_card_has_valid_metadata_scores_and_the_baseline(folder: Path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.language == "en"
    assert card.data.license is None
    assert card.data.library_name == "transformers"
    assert {result.metric_type for result in card.data.eval_results or []} == {"accuracy", "f1"}
    assert "| TF-IDF + logistic regression |" in card.text
    assert r"a\|b \<i\>\_" in card.text


def test_a_new_evaluation_makes_a_new_card_and_nothing_else_does(labels: LabelsStage, home: Path, built: Built):
    knob_only = export_of(evaluate_of(labels, random_init=True), language="en")
    assert made(knob_only, home).status == "reused"
    other = made(export_of(evaluate_of(labels, bootstrap=200), language="en"), home)
    assert other.key != built.key


@pytest.mark.slow
def test_a_classifier_that_transformers_has_no_class_for_is_exported_as_a_graph(labels: LabelsStage, home: Path):
    stages = evaluate_of(labels)
    stages = replace(stages, classifier=RandomClassifier(labels=labels, pooling="mean"))
    built = made(export_of(stages), home)
    folder = Store(home).open("export", built.key)
    names = {path.name for path in folder.iterdir()}
    assert {"model.onnx", "model.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    assert "config.json" not in names
    assert "onnxruntime gives our logits within" in built.notes["headline"]
    rows = pq.read_table(input_of(home, built, "evaluation", "evaluate") / "predictions.parquet")
    ours = probabilities(export.read(folder).loaded, rows.column("text").to_pylist())
    assert np.abs(ours - np.array(rows.column("probabilities").to_pylist())).max() < 1e-5
    card = (folder / "README.md").read_text()
    assert "library_name: onnx" in card
    _run_the_code_of(card, folder)


def _run_the_code_of(card: str, folder: Path) -> None:
    """The example of a card works in a fresh process, in its folder."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    lines = code[1].rstrip().splitlines()
    script = "\n".join([*lines[:-1], f"print({lines[-1]})"])
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in json.loads((folder / "model.json").read_text())["labels"]


def test_further_formats_lie_in_folders_of_their_names(labels: LabelsStage, home: Path, built: Built, folder: Path):
    more = made(export_of(evaluate_of(labels, random_init=True), language="en", formats=("auto", "gguf")), home)
    both = Store(home).open("export", more.key)
    assert (both / "gguf" / "model.gguf").is_file()
    assert (both / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "transformers gives our logits" in more.notes["headline"]
    assert "llama.cpp gives our logits" in more.notes["headline"]


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (("gguf", "hf"), r"formats=\['gguf', 'hf'\] must begin with auto, hf or onnx"),
        (("hf", "tflite"), r"'tflite' must be one of auto, gguf, hf, onnx"),
    ],
)
def test_formats_that_cannot_be_are_refused(formats: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        ExportConfig(formats=formats)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "mean"}, r"finetune\.pooling=mean has no stock Llama form"),
        ({"sliding_window": 8}, r"model\.sliding_window=8 has no stock Llama form"),
        ({"bidirectional": True}, r"reads both ways \(finetune\.bidirectional"),
        ({"causal": False}, r"reads both ways \(finetune\.bidirectional, pretrain\.objective\)"),
    ],
)
def test_what_has_no_stock_form_is_refused_before_anything_is_trained_or_becomes_a_graph(
    labels: LabelsStage, tmp_path: Path, changes: dict[str, Any], message: str
):
    evaluation = evaluate_of(labels)
    tokenizer = TokenizerStage(config=TokenizerConfig(), corpus=corpus_of(tmp_path / "x.txt"))
    shape = {key: changes.pop(key) for key in ("sliding_window", "causal") if key in changes}
    cfg = ModelConfig(
        vocab_size=300, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, seq_len=24, **shape
    )  # fmt: skip
    classifier = Finetune(
        config=FinetuneConfig(**(SIMPLE | changes)), model=cfg, base=None, tokenizer=tokenizer, labels=labels
    )
    for formats in (("hf",), ("auto", "gguf")):
        with pytest.raises(UsageError, match=message):
            Export(config=ExportConfig(formats=formats), classifier=classifier, labels=labels, evaluation=evaluation)
    Export(config=ExportConfig(), classifier=classifier, labels=labels, evaluation=evaluation)


def _shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _reshape(file: Path) -> None:
    record = json.loads(file.read_text())
    sizes = record.get("model", record)
    for name in sizes.keys() & {"d_ff", "intermediate_size"}:
        sizes[name] += 2
    file.write_text(json.dumps(record))


def _add_a_field(file: Path) -> None:
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"model": record["model"] | {"d_new": 1}}))


@pytest.mark.parametrize(
    ("form", "name", "damage", "message"),
    [
        ("ours", "model.safetensors", _shorten, r"model\.safetensors: .*damaged"),
        ("ours", "model.safetensors", Path.unlink, r"model\.safetensors: cannot be read: No such file"),
        ("ours", "model.json", _reshape, "not the weights of a Classifier of this shape: body.blocks.0.mlp"),
        ("ours", "model.json", _add_a_field, r"model\.json: model: .*'d_new'"),
        ("ours", "tokenizer.json", Path.unlink, r"tokenizer\.json: no tokenizer that can be read"),
        ("hf", "model.safetensors", _shorten, r"model\.safetensors: damaged"),
        ("hf", "model.safetensors", Path.unlink, r"holds no model\*\.safetensors"),
        ("hf", "config.json", _reshape, r"weights of another shape than the config says: .*mlp"),
        ("hf", "tokenizer.json", _shorten, r"tokenizer\.json: no tokenizer that can be read"),
    ],
)
def test_a_damaged_folder_is_refused_by_the_file_that_is_wrong(
    tmp_path: Path, form: str, name: str, damage: Callable[[Path], None], message: str
):
    folder = classifier_folder(tmp_path / "ours")
    if form == "hf":
        subject, _ = subject_of(folder, 1.0)
        folder = tmp_path / "hf"
        folder.mkdir()
        export.load("hf").write(folder, subject)
    export.read(folder)
    damage(folder / name)
    with pytest.raises(UsageError, match=message):
        export.read(folder)


def _copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))
