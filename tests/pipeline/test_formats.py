"""Every export format: its own program computes our calibrated logits from it, or it says what it cannot express."""

import copy
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from model.heads import Classifier
from pipeline import export
from pipeline.classify import probabilities
from pipeline.errors import StageFailed, UsageError
from pipeline.export import Expected, compare, expected, verification_texts, vocabulary_texts
from pipeline.publish import digests
from pipeline.weights import ClassifierFiles
from pipeline.windows import Windows
from tests.pipeline.toy_export import classifier_folder, subject_of

TEXTS = ["the cat", "Why?", "a dog ran, over 17 hills'", " été\n\n日本 \u00a0x", "<|eos|> mat", "cat " * 40]
TEMPERATURE = 1.7
BODIES = {
    "last": {},
    "first": {"n_layers": 1},
    "mean": {"causal": False, "n_layers": 1},
    "attention": {"causal": False, "sliding_window": 5, "n_layers": 1},
}
"""Shapes of a classifier, by its pooling."""
RECORDS = {"hf": "config.json", "onnx": "model.json", "gguf": "classifier.json"}
"""Where a format says what the classifier is."""


@pytest.fixture(scope="module", autouse=True)
def _no_traces():
    """Torch logs each step of a trace at level debug, which pytest would keep."""
    log = logging.getLogger("torch.__trace")
    log.propagate = False
    yield
    log.propagate = True


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier artifact of every pooling."""
    root = tmp_path_factory.mktemp("classifiers")
    return {pooling: classifier_folder(root / pooling, pooling=pooling, **shape) for pooling, shape in BODIES.items()}


@pytest.fixture(scope="module")
def written(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a format and a pooling, written once."""

    @cache
    def write(name: str, pooling: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-{pooling}")
        export.load(name).write(folder, subject_of(files[pooling], TEMPERATURE)[0])
        return folder

    return write


def wanted_of(folder: Path) -> Expected:
    return expected(subject_of(folder, 1.0)[1], TEXTS, TEMPERATURE)


@pytest.mark.parametrize("name", export.names())
@pytest.mark.parametrize("pooling", BODIES)
def test_a_format_gives_our_logits_over_the_temperature_or_is_refused(
    files: dict[str, Path], written: Callable[[str, str], Path], tmp_path: Path, name: str, pooling: str
):
    subject, loaded = subject_of(files[pooling], TEMPERATURE)
    if export.load(name).refusal(loaded.model.cfg, pooling) is None:
        wanted = wanted_of(files[pooling])
        assert compare(name, export.load(name).logits(written(name, pooling), wanted), wanted, 1e-5) < 1e-5
    else:
        with pytest.raises(UsageError, match=rf"finetune\.pooling={pooling} .*cannot be exported as {name}"):
            export.export(name, tmp_path / "out", subject, wanted_of(files[pooling]), 1e-5)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", export.names())
def test_equal_classifiers_give_equal_bytes(
    files: dict[str, Path], written: Callable[[str, str], Path], tmp_path: Path, name: str
):
    export.load(name).write(tmp_path, subject_of(files["last"], TEMPERATURE)[0])
    assert digests(tmp_path) == digests(written(name, "last"))


@pytest.mark.parametrize("name", export.names())
def test_another_classifier_or_other_labels_in_the_folder_are_found(
    written: Callable[[str, str], Path], tmp_path: Path, name: str
):
    wanted = wanted_of(classifier_folder(tmp_path / "other", seed=1))
    with pytest.raises(StageFailed, match=r"computes other logits .* differ by up to .* more than"):
        compare("it", export.load(name).logits(written(name, "last"), wanted), wanted, 1e-5)
    with pytest.raises(StageFailed, match="calls its labels"):
        export.load(name).logits(written(name, "last"), replace(wanted, labels=["x", "y", "z"]))


@pytest.mark.parametrize("name", export.READABLE)
def test_what_we_read_back_is_bit_identical_and_knows_its_temperature(
    files: dict[str, Path], written: Callable[[str, str], Path], name: str
):
    subject, back = subject_of(files["last"], TEMPERATURE)[0], export.read(written(name, "last"))
    assert back.temperature == TEMPERATURE
    assert back.loaded.labels == subject.loaded.labels
    theirs, ours = dict(back.loaded.model.named_parameters()), dict(subject.loaded.model.named_parameters())
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize("name", export.names())
def test_how_long_texts_are_read_goes_along_and_a_program_gives_the_logits_of_one_window(tmp_path: Path, name: str):
    folder = classifier_folder(tmp_path / "artifact", n_layers=1, windows=Windows(3, 5))
    subject, loaded = subject_of(folder, TEMPERATURE)
    wanted = expected(loaded, TEXTS, TEMPERATURE)
    assert export.export(name, tmp_path / "out", subject, wanted, 1e-5) < 1e-5
    record = json.loads((tmp_path / "out" / RECORDS[name]).read_text())
    assert record["reading_windows"] == {"count": 3, "overlap": 5}
    if name in export.READABLE:
        back = export.read(tmp_path / "out").loaded
        assert back.windows == Windows(3, 5)
        assert np.abs(probabilities(back, TEXTS) - probabilities(subject.loaded, TEXTS)).max() < 1e-6


@pytest.mark.parametrize("name", export.names())
def test_ngrams_go_along_or_the_format_is_refused_by_their_name(tmp_path: Path, name: str):
    folder = classifier_folder(tmp_path / "artifact", n_layers=1, windows=Windows(3, 5), ngrams=3)
    subject, loaded = subject_of(folder, TEMPERATURE)
    wanted = expected(loaded, TEXTS, TEMPERATURE)
    if name != "onnx":
        with pytest.raises(UsageError, match=rf"^ngrams have no stock Llama form .* cannot be exported as {name}"):
            export.export(name, tmp_path / "out", subject, wanted, 1e-5)
        return
    plain = expected(replace(loaded, model=_without_ngrams(loaded.model)), TEXTS, TEMPERATURE)
    assert (wanted.logits - plain.logits).abs().max() > 0.1
    assert export.export(name, tmp_path / "out", subject, wanted, 1e-5) < 1e-5
    back = export.read(tmp_path / "out").loaded
    assert np.array_equal(probabilities(back, TEXTS), probabilities(subject.loaded, TEXTS))


def _without_ngrams(model: Classifier) -> Classifier:
    plain = copy.deepcopy(model)
    plain.ngrams = None
    return plain


def test_a_folder_that_says_nonsense_of_its_windows_is_refused(tmp_path: Path):
    folder = classifier_folder(tmp_path, n_layers=1, windows=Windows(3, 22))
    with pytest.raises(UsageError, match=r"no classifier that can be read: reading_windows: window_overlap=22 must"):
        export.read(folder)


@pytest.mark.parametrize("name", export.names())
def test_nothing_is_noted_of_one_window(written: Callable[[str, str], Path], name: str):
    assert "reading_windows" not in (written(name, "last") / RECORDS[name]).read_text()


def test_a_classifier_artifact_is_read_as_it_is(files: dict[str, Path]):
    back, direct = export.read(files["first"]), ClassifierFiles(files["first"]).load()
    assert back.temperature == 1.0
    assert torch.equal(back.loaded.model.head.score.weight, direct.model.head.score.weight)


def test_a_folder_that_holds_no_classifier_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no classifier"):
        export.read(tmp_path)


def test_auto_is_the_first_format_that_can_express_the_classifier(files: dict[str, Path]):
    stock = subject_of(files["last"], 1.0)[1].model.cfg
    assert export.choose(["auto", "gguf"], stock, "last") == ["hf", "gguf"]
    assert export.choose(["auto", "onnx"], stock, "mean") == ["onnx"]
    with pytest.raises(UsageError, match=r"finetune\.pooling=mean .* cannot be exported as gguf"):
        export.choose(["auto", "gguf"], stock, "mean")


def test_texts_to_verify_on_are_spread_long_overlong_and_forged(files: dict[str, Path]):
    texts = verification_texts(["b " * n for n in range(1, 100)], 4, seq_len=24)
    lengths = [len(text.split()) for text in texts]
    assert lengths[:4] == [1, 34, 66, 99]
    assert lengths[4] > 24
    assert texts[5] == "<|eos|> b  <|pad|>"
    assert len(verification_texts(["same"] * 9, 16, seq_len=24)) == 3
    assert max(map(len, verification_texts(["没有空格" * 10**5, "b"], 4, seq_len=24))) < 1000
    tokenizer = subject_of(files["last"], 1.0)[1].tokenizer
    words = vocabulary_texts(tokenizer, 5, seq_len=24)
    assert words == vocabulary_texts(tokenizer, 5, seq_len=24)
    assert len(words) == 7


def test_a_logit_that_is_no_number_is_no_agreement(files: dict[str, Path]):
    wanted = wanted_of(files["last"])
    with pytest.raises(StageFailed, match="differ by up to nan"):
        compare("it", {"somehow": wanted.logits * float("nan")}, wanted, 1e-5)


def test_a_classifier_that_counted_ngrams_otherwise_is_refused(tmp_path: Path):
    folder = classifier_folder(tmp_path, n_layers=1, ngrams=2)
    record = json.loads((folder / "model.json").read_text())
    del record["ngrams"]["counts"]
    (folder / "model.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="counted n-grams otherwise; run its pipeline again"):
        ClassifierFiles(folder).load()
