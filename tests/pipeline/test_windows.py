"""Long texts in windows: which tokens are read, what becomes of the logits, and what the end of a text teaches."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from pipeline import ledger
from pipeline.assessment import Answers, measure
from pipeline.batches import LabelledSampling
from pipeline.bpe import TokenizerConfig
from pipeline.classify import document_probabilities, probabilities, tokenize, tokenize_windows
from pipeline.errors import UsageError
from pipeline.runner import Built, build, submit_here
from pipeline.splitting import LabelledSplit
from pipeline.stages.corpus import CorpusConfig, CorpusStage
from pipeline.stages.finetune import Finetune, FinetuneConfig, balanced_weights
from pipeline.stages.labels import Labels, LabelsConfig, LabelsStage
from pipeline.stages.tokenizer import TokenizerStage
from pipeline.store import Store
from pipeline.tracking import read_journal
from pipeline.weights import ClassifierFiles, LoadedClassifier
from pipeline.windows import ONE_WINDOW, Windows, loss_weights, mean_over_windows
from tests.pipeline.recipes import SIMPLE
from tests.pipeline.toy_export import classifier_folder

BOS, EOS = 900, 901
SHORT = ["the cat", "Why?", "a dog ran over the hill", ""]
LONG = ["the cat sat on the mat and " * 9, "a dog ran over the hill and far away " * 3, "mat " * 200]
FILLER = ["the", "a", "of", "and", "to", "in", "on", "at", "by", "it"]
SIGNS = {"day": "sun", "night": "moon"}


def text_of(n: int) -> np.ndarray:
    """A text whose tokens count upwards."""
    return np.array([BOS, *range(n), EOS], dtype=np.int32)


readings = st.tuples(st.integers(3, 20), st.integers(1, 6), st.integers(0, 17)).filter(
    lambda drawn: Windows(drawn[1], drawn[2]).refusal(drawn[0]) is None
)


@given(readings, st.integers(0, 120))
def test_windows_cover_the_text_once_but_for_what_they_share(reading: tuple[int, int, int], n: int):
    seq_len, count, overlap = reading
    windows = Windows(count, overlap if count > 1 else 0)
    cut = windows.cut(text_of(n), seq_len)
    parts = [ids[1:-1].tolist() for ids in cut]
    assert all(ids[0] == BOS and ids[-1] == EOS and len(ids) <= seq_len for ids in cut)
    assert [*parts[0], *(token for part in parts[1:] for token in part[windows.overlap :])] == list(
        range(min(n, windows.longest(seq_len)))
    )
    for before, after in pairwise(parts):
        assert windows.overlap == 0 or before[-windows.overlap :] == after[: windows.overlap]


@given(readings, st.integers(0, 120))
def test_windows_are_as_few_as_hold_the_text_and_none_is_a_tiny_rest(reading: tuple[int, int, int], n: int):
    seq_len, count, overlap = reading
    windows = Windows(count, overlap if count > 1 else 0)
    lengths = [len(ids) for ids in windows.cut(text_of(n), seq_len)]
    assert len(lengths) <= count
    assert max(lengths) - min(lengths) <= 1
    if len(lengths) > 1:
        assert Windows(len(lengths) - 1, windows.overlap).longest(seq_len) < n


@given(st.integers(1, 20), st.integers(0, 40))
def test_one_window_cuts_the_text(seq_len: int, n: int):
    whole = text_of(n).tolist()
    [ids] = ONE_WINDOW.cut(text_of(n), seq_len)
    assert ids.tolist() == (whole if len(whole) <= seq_len else [*whole[: seq_len - 1], EOS])


def test_what_is_noted_of_windows_is_read_back_and_nothing_is_noted_of_one():
    assert Windows.of(Windows(3, 4).record, 24) == Windows(3, 4)
    assert ONE_WINDOW.record == {}
    assert Windows.of({"labels": []}, 24) == ONE_WINDOW
    for record in ({"count": 2, "overlap": 22}, {"count": 0, "overlap": 0}, {"count": 2, "overlap": -1}):
        with pytest.raises(ValueError, match="reading_windows: "):
            Windows.of({"reading_windows": record}, 24)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_every_text_counts_alike_however_many_windows_it_has(counts: list[int]):
    weights = loss_weights(counts)
    if weights is None:
        assert set(counts) == {1}
        return
    assert weights.dtype == np.float32
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    ends = np.cumsum(counts)[:-1]
    totals = [part.sum() for part in np.split(weights, ends)]
    assert totals == pytest.approx([totals[0]] * len(counts), rel=1e-5)


def test_balanced_classes_are_balanced_by_texts_and_not_by_windows():
    targets, counts = np.array([0, 0, 0, 1]), [1, 2, 5, 4]
    by_text = balanced_weights(targets)
    by_window = balanced_weights(np.repeat(targets, counts), loss_weights(counts))
    torch.testing.assert_close(by_window, by_text)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {pooling: classifier_folder(root / pooling, pooling=pooling) for pooling in ("last", "mean")}


def loaded(folder: Path, windows: Windows = ONE_WINDOW) -> LoadedClassifier:
    return replace(ClassifierFiles(folder).load(), windows=windows)


def test_a_text_that_fits_has_the_same_probabilities_bit_for_bit(folders: dict[str, Path]):
    before, after = (loaded(folders["last"], windows) for windows in (ONE_WINDOW, Windows(4, 3)))
    assert np.array_equal(probabilities(before, SHORT), probabilities(after, SHORT))
    for text in SHORT:
        assert np.array_equal(probabilities(before, [text]), probabilities(after, [text]))
    assert not np.allclose(probabilities(before, LONG), probabilities(after, LONG), atol=1e-4)


@pytest.mark.parametrize("tokens_per_batch", [8192, 200])
def test_the_probabilities_of_a_text_do_not_depend_on_its_company(
    folders: dict[str, Path], tokens_per_batch: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.classify.TOKENS_PER_BATCH", tokens_per_batch)
    classifier, texts = loaded(folders["last"], Windows(5, 2)), [*LONG, *SHORT]
    alone = np.concatenate([probabilities(classifier, [text]) for text in texts])
    assert np.abs(probabilities(classifier, texts * 3) - np.tile(alone, (3, 1))).max() < 1e-5


def test_the_mean_of_the_logits_is_the_score_of_the_mean_over_all_tokens(folders: dict[str, Path]):
    """Where each window's vector is the mean of its states and all windows are of one length."""
    classifier = loaded(folders["mean"], Windows(3, 0))
    model = classifier.model.double()
    [windows] = tokenize_windows(classifier.tokenizer, ["mat " * 200], 24, classifier.windows)
    assert [len(ids) for ids in windows] == [24] * 3
    rows = torch.from_numpy(np.stack(windows)).long()
    score = model.head.score(model.body(rows).flatten(0, 1).mean(dim=0))
    torch.testing.assert_close(mean_over_windows(model(rows), [3])[0], score, atol=1e-12, rtol=0)
    answered = document_probabilities(model, [windows])[0]
    assert np.abs(answered - score.softmax(-1).detach().numpy()).max() < 1e-6


def test_each_of_several_ranks_fills_in_its_texts(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.classify.TOKENS_PER_BATCH", 100)
    classifier = loaded(folders["last"], Windows(5, 2))
    documents = tokenize_windows(classifier.tokenizer, [*LONG, *SHORT], 24, classifier.windows)
    score = partial(document_probabilities, classifier.model, documents)
    shares = [score(rank=rank, world_size=3) for rank in range(3)]
    assert all((sum(share[row].any() for share in shares)) == 1 for row in range(len(documents)))
    assert np.abs(sum(shares) - score()).max() < 1e-6


def test_lengths_cuts_and_tokens_read_are_those_of_all_windows(folders: dict[str, Path]):
    texts, windows = [*LONG, *SHORT], Windows(3, 4)
    classifier = loaded(folders["last"], windows)
    split = LabelledSplit(texts, np.arange(len(texts), dtype=np.int64) % 3)
    answers = Answers.of(classifier, split, probabilities(classifier, texts), 1.0)
    whole = [len(ids) for ids in tokenize(classifier.tokenizer, texts, 10**6)]
    read = tokenize_windows(classifier.tokenizer, texts, 24, windows)
    assert answers.longest == 3 * 22 - 2 * 4
    assert answers.lengths.tolist() == [length - 2 for length in whole]
    assert answers.n_read.tolist() == [sum(map(len, ids)) for ids in read]
    [*_, last] = measure(answers, resamples=100)["slices"]["length"]
    assert last["name"] == "cut off after 58 tokens"
    assert last["n"] == sum(length - 2 > 58 for length in whole) > 0
    one = Answers.of(loaded(folders["last"]), split, answers.raw, 1.0)
    assert one.n_read.tolist() == np.minimum(whole, 24).tolist()


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def texts_with_a_late_word(folder: Path, words: tuple[int, int]) -> Path:
    """Texts whose class is told by one word of their last third, between so many words that say nothing."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(240):
        label = draw.choice(list(SIGNS))
        text = draw.choices(FILLER, k=draw.randint(*words))
        text.insert(draw.randint(-(-2 * len(text) // 3), len(text)), SIGNS[label])
        split = "train" if number % 4 else ("validation", "test")[number % 8 == 0]
        lines.append(json.dumps({"text": " ".join(text), "label": label, "split": split}))
    (folder / "late.jsonl").write_text("\n".join(lines))
    (folder / "corpus.txt").write_text("\n".join(" ".join([*FILLER, *SIGNS.values()]) for _ in range(50)))
    return folder


def finetuning(folder: Path, **changes: object) -> Finetune:
    corpus = CorpusStage(config=CorpusConfig(path=str(folder / "corpus.txt")))
    shape = ModelConfig(vocab_size=300, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=48, seq_len=16)
    settings = {"lr": 1e-2, "precision": "fp32", "epochs": 6, "patience": 6, "batch_size": 16, "pooling": "mean"}
    return Finetune(
        config=FinetuneConfig(**(SIMPLE | settings | changes)),
        model=shape,
        base=None,
        tokenizer=TokenizerStage(config=TokenizerConfig(vocab_size=300), corpus=corpus),
        labels=LabelsStage(config=LabelsConfig(path=str(folder / "late.jsonl"), split="split")),
    )


def built(target: Finetune, home: Path, **how: object) -> Built:
    events = build([target], Store(home), lambda job: submit_here(job, **how))
    return [event for event in events if isinstance(event, Built)][-1]


def files_of(target: Finetune, home: Path) -> ClassifierFiles:
    return ClassifierFiles(Store(home).path("finetune", built(target, home).key))


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts_with_a_late_word(tmp_path_factory.mktemp("late"), (30, 50))


def labels_of(target: Finetune, home: Path) -> Labels:
    return target.labels.load(Store(home).path("labels", built(target.labels, home).key))


def sampling_of(target: Finetune, home: Path) -> LabelledSampling:
    tokenizer = target.tokenizer.load(Store(home).path("tokenizer", built(target.tokenizer, home).key))
    return target._data(labels_of(target, home), tokenizer.load())[0]


def test_each_window_is_an_example_with_the_class_of_its_text_and_texts_count_alike(late: Path, tmp_path: Path):
    sampling = sampling_of(finetuning(late, windows=3), tmp_path)
    split = labels_of(finetuning(late), tmp_path).split("train")
    assert len(sampling.documents) > 2 * len(split.texts)
    assert sampling.weights is not None
    per_class = np.bincount(sampling.targets, sampling.weights)
    np.testing.assert_allclose(per_class / per_class.sum(), np.bincount(split.targets) / len(split.texts), rtol=1e-5)
    assert sampling_of(finetuning(late, windows=1), tmp_path).weights is None


def test_windows_learn_what_only_the_end_of_a_text_tells(late: Path, tmp_path: Path):
    accuracy = {}
    for windows in (1, 4):
        target = finetuning(late, windows=windows)
        done = built(target, tmp_path)
        split = labels_of(target, tmp_path).split("validation")
        table = probabilities(files_of(target, tmp_path).load(), split.texts)
        accuracy[windows] = (table.argmax(axis=1) == split.targets).mean()
        assert accuracy[windows] == pytest.approx(done.notes["metrics"]["val/accuracy"])  # as examined, so used
    assert accuracy[1] < 0.7
    assert accuracy[4] > 0.95


@pytest.mark.parametrize("changes", [{"method": "lora"}, {"r_drop": 0.5, "class_weights": "balanced"}])
def test_windows_go_with_other_ways_to_fine_tune(late: Path, tmp_path: Path, changes: dict[str, object]):
    done = built(finetuning(late, windows=4, window_overlap=2, epochs=5, **changes), tmp_path)
    assert done.notes["metrics"]["val/accuracy"] > 0.8


def test_windows_go_with_several_classes_a_text(late: Path, tmp_path: Path):
    rows = [json.loads(line) for line in (late / "late.jsonl").read_text().splitlines()]
    listed = [json.dumps({**row, "label": [row["label"]]}) for row in rows]
    (tmp_path / "listed.jsonl").write_text("\n".join(listed))
    target = finetuning(late, windows=4, window_overlap=2, r_drop=0.5, class_weights="balanced")
    several = LabelsStage(config=replace(target.labels.config, path=str(tmp_path / "listed.jsonl"), multi_label=True))
    assert built(replace(target, labels=several), tmp_path).notes["metrics"]["val/accuracy"] > 0.8


def test_where_every_text_fits_windows_change_no_weight(tmp_path: Path):
    folder = texts_with_a_late_word(tmp_path / "short", (3, 9))
    one, several = (files_of(finetuning(folder, epochs=1, windows=count), tmp_path) for count in (1, 4))
    assert (one.path / "model.safetensors").read_bytes() == (several.path / "model.safetensors").read_bytes()
    noted = json.loads((several.path / "model.json").read_text())
    assert noted.pop("reading_windows") == {"count": 4, "overlap": 0}
    assert noted == json.loads((one.path / "model.json").read_text())
    assert several.load().windows == Windows(4)


@pytest.mark.slow
def test_two_ranks_learn_what_one_does_and_read_every_window_once(late: Path, tmp_path: Path):
    from jobs.gang_local import LocalGang

    target = finetuning(late, windows=4, window_overlap=3, epochs=1, dropout=0.0, log_every=1, ledger=True, lr=1e-3)
    one = built(target, tmp_path / "one")
    two = built(replace(target, config=replace(target.config, zero_stage=1)), tmp_path / "two", gang=LocalGang(2, 1))
    assert one.key == two.key
    losses = [
        [p.metrics["train/loss"] for p in read_journal(journal) if "train/loss" in p.metrics]
        for journal in (Store(tmp_path / home).journal("finetune", one.key) for home in ("one", "two"))
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    sampling = sampling_of(target, tmp_path / "one")
    for home in ("one", "two"):
        written = Store(tmp_path / home).journal("finetune", one.key).with_suffix(".ledger")
        assert ledger.check(written, lambda step: sampling.step(step).sample_ids, sampling.steps_per_epoch) == []


def test_windows_that_share_more_than_they_hold_are_refused_where_it_is_written(tmp_path: Path):
    with pytest.raises(ValueError, match=r"window_overlap=6 must be less than the 6 tokens .* of seq_len=8"):
        FinetuneConfig(seq_len=8, windows=2, window_overlap=6)
    with pytest.raises(UsageError, match=r"finetune\.window_overlap=14 must be less than the 14 tokens"):
        finetuning(tmp_path, windows=2, window_overlap=14)
    assert FinetuneConfig(seq_len=8, window_overlap=6).reading == ONE_WINDOW  # one window shares nothing
