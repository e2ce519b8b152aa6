import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from pipeline.classify import probabilities
from pipeline.errors import StageFailed, UsageError
from pipeline.runner import Built
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.export import Export, ExportConfig, verification_texts, verify_export
from pipeline.stages.finetune import Finetune, FinetuneConfig
from pipeline.stages.labels import LabelsStage
from pipeline.stages.tokenizer import TokenizerConfig, TokenizerStage
from pipeline.store import Store
from pipeline.weights import ClassifierFiles, LoadedClassifier
from tests.pipeline.data_stages import corpus_of, made
from tests.pipeline.toy_classifier import evaluate_of, labels_of

TEXTS = ["apple", "iron zinc and tin", "one two three four one two three four one two", "<|eos|> pear"]


def export_of(evaluation: Evaluate, **config: object) -> Export:
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


@pytest.fixture(scope="module")
def folder(home: Path, built: Built) -> Path:
    return Store(home).open("export", built.key)


@pytest.fixture(scope="module")
def loaded(home: Path, built: Built) -> LoadedClassifier:
    manifest = Store(home).find("export", built.key)
    assert manifest
    key = manifest.meta["input_keys"]["classifier"]["key"]
    return ClassifierFiles(Store(home).path("randomclassifier", key)).load()


def test_the_folder_is_a_stock_classifier(folder: Path, built: Built):
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "a|b <i>_", "1": "fruit", "2": "metal"}
    assert "auto_map" not in config
    assert not list(folder.glob("*.py"))
    assert built.notes["model"] == {"role": "classifier"}
    assert built.notes["files"] == ["README.md"]
    assert built.notes["metrics"]["export/logit_difference"] < 1e-5


def test_transformers_pipeline_gives_our_labels(folder: Path, loaded: LoadedClassifier):
    from transformers import pipeline

    theirs = pipeline("text-classification", model=str(folder))(TEXTS, truncation=True)
    ours = probabilities(loaded, TEXTS)
    assert [row["label"] for row in theirs] == [loaded.labels[i] for i in ours.argmax(axis=1)]
    assert [row["score"] for row in theirs] == pytest.approx(ours.max(axis=1).tolist(), abs=1e-5)


def test_verification_reads_short_long_overlong_and_forged_texts():
    texts = verification_texts(["b " * n for n in range(1, 100)], 4, seq_len=24)
    lengths = [len(text.split()) for text in texts]
    assert lengths[:4] == [1, 34, 66, 99]
    assert lengths[4] > 24
    assert texts[5] == "<|eos|> b  <|pad|>"
    assert len(verification_texts(["same"] * 9, 16, seq_len=24)) == 3


@pytest.mark.parametrize("weight", ["score.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_changed_weight_is_found_and_its_size_told(
    folder: Path, loaded: LoadedClassifier, tmp_path: Path, weight: str
):
    copy = _copy(folder, tmp_path)
    weights = load_file(copy / "model.safetensors")
    weights[weight] = weights[weight] * 1.01
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageFailed, match=r"differ by up to \d\.\d+e-0\d, more than .*export\.tolerance=1e-05"):
        verify_export(copy, loaded, TEXTS, 1e-5)


def test_a_changed_label_or_tokenizer_is_found(folder: Path, loaded: LoadedClassifier, tmp_path: Path):
    copy = _copy(folder, tmp_path)
    with pytest.raises(StageFailed, match="calls its labels"):
        verify_export(copy, replace(loaded, labels=["x", "y", "z"]), TEXTS, 1e-5)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "split_special_tokens": False}))
    with pytest.raises(StageFailed, match=r"tokenizer reads '<\|eos\|> pear' as"):
        verify_export(copy, loaded, TEXTS, 1e-5)


def test_a_logit_that_is_no_number_is_no_agreement(folder: Path, loaded: LoadedClassifier, tmp_path: Path):
    copy = _copy(folder, tmp_path)
    weights = load_file(copy / "model.safetensors")
    weights["score.weight"][0, 0] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageFailed, match="differ by up to nan"):
        verify_export(copy, loaded, TEXTS, 1e-5)


def test_verification_leaves_the_matmul_precision_as_it_was(folder: Path, loaded: LoadedClassifier):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert verify_export(folder, loaded, TEXTS, 1e-5) < 1e-5
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_card_has_valid_metadata_scores_and_the_baseline(folder: Path):
    from huggingface_hub import ModelCard

    card = ModelCard.load(folder / "README.md")
    assert card.data.language == "en"
    assert card.data.license is None
    assert {result.metric_type for result in card.data.eval_results or []} == {"accuracy", "f1"}
    assert "| TF-IDF + logistic regression |" in card.text
    assert "did better on this test set" in card.text
    assert r"a\|b \<i\>\_" in card.text


def test_a_new_evaluation_makes_a_new_card_and_nothing_else_does(labels: LabelsStage, home: Path, built: Built):
    knob_only = export_of(evaluate_of(labels, random_init=True), language="en")
    assert made(knob_only, home).status == "reused"
    other = made(export_of(evaluate_of(labels, bootstrap=200), language="en"), home)
    assert other.key != built.key


@pytest.mark.parametrize(
    ("field", "text"), [("pooling", "finetune.pooling=mean"), ("window", "model.sliding_window=8")]
)
def test_what_has_no_stock_form_is_refused_before_anything_is_trained(
    labels: LabelsStage, tmp_path: Path, field: str, text: str
):
    evaluation = evaluate_of(labels)
    tokenizer = TokenizerStage(config=TokenizerConfig(), corpus=corpus_of(tmp_path / "x.txt"))
    cfg = ModelConfig(
        vocab_size=300, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=32, seq_len=24,
        sliding_window=8 if field == "window" else None,
    )  # fmt: skip
    classifier = Finetune(
        config=FinetuneConfig(pooling="mean" if field == "pooling" else "last"),
        model=cfg,
        base=None,
        tokenizer=tokenizer,
        labels=labels,
    )
    with pytest.raises(UsageError, match=text):
        Export(config=ExportConfig(), classifier=classifier, labels=labels, evaluation=evaluation)


def _copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))
