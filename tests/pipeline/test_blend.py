"""Validation texts say what n-grams count beside a network."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.blend import Blend
from pipeline.blend import Logits, fit, log_loss, logits_of
from pipeline.classify import probabilities
from pipeline.errors import UsageError
from pipeline.metrics import calibrated_log_loss
from pipeline.ngrams import fill
from pipeline.runner import Built, build, submit_here
from pipeline.stage import Stage
from pipeline.stages.blend import BlendStage
from pipeline.stages.finetune import Finetune
from pipeline.stages.labels import LabelsConfig, LabelsStage
from pipeline.stages.ngrams import NGramsConfig, NGramsStage
from pipeline.store import Store
from pipeline.targets import Targets, members
from pipeline.windows import mean_over_windows
from tests.pipeline.test_windows import finetuning, texts_with_a_late_word


def drawn(seed: int, *, several: bool) -> tuple[Targets, Logits, Logits, list[int]]:
    """Forty texts of one or two windows: what is true, and logits that know of it."""
    draw = np.random.default_rng(seed)
    targets = draw.integers(0, 2, (40, 3)) if several else draw.integers(0, 3, 40)
    counts = draw.integers(1, 3, 40)
    truth = np.repeat(targets if several else np.eye(3)[targets], counts, axis=0)
    deep, wide = (truth * draw.uniform(0, 2) + draw.normal(0, 1.5, truth.shape) for _ in range(2))
    return targets, deep, wide, counts.tolist()


def loss_of(blend: Blend, targets: Targets, deep: Logits, wide: Logits, counts: list[int]) -> float:
    logits = blend(torch.from_numpy(deep), torch.from_numpy(wide), multi_label=targets.ndim == 2)
    return log_loss(torch.from_numpy(targets), mean_over_windows(logits, counts)).item()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.floats(0, 2), st.floats(0, 2))
def test_no_sum_of_both_has_a_lower_log_loss(seed: int, several: bool, by_deep: float, by_wide: float):
    texts = drawn(seed, several=several)
    best, other = Blend(), Blend()
    fit(best, *texts)
    with torch.no_grad():
        other.by.copy_(torch.tensor([[by_deep, by_wide]] * 2))
    assert best.by.min() >= 0
    assert loss_of(best, *texts) <= loss_of(other, *texts) + 1e-4


def test_a_mixture_is_found_where_one_of_the_two_is_lost_and_nobody_knows_which():
    """In each row one is right and the other as sure of something else: half belief in each is the best."""
    draw = np.random.default_rng(0)
    targets, wrong = draw.integers(0, 5, 4000), draw.integers(0, 5, 4000)
    right = draw.integers(0, 2, 4000) == 0
    deep, wide = (6 * np.eye(5)[np.where(mask, targets, wrong)] for mask in (right, ~right))
    texts = targets, deep, wide, [1] * 4000
    one, two = Blend(), Blend()
    fit(two, *texts)
    with torch.no_grad():
        one.by.copy_(torch.tensor([[0.5, 0.5]] * 2))
    assert two.share.sigmoid().item() == pytest.approx(0.5, abs=0.05)
    assert loss_of(two, *texts) < loss_of(one, *texts) - 0.05


def test_logits_give_their_probabilities_back():
    table = np.array([[0.2, 0.5, 0.3], [0.0, 1.0, 0.0]])
    softmax = np.exp(logits_of(table, multi_label=False))
    np.testing.assert_allclose(softmax / softmax.sum(axis=1, keepdims=True), table, atol=1e-9)
    np.testing.assert_allclose(1 / (1 + np.exp(-logits_of(table, multi_label=True))), table, atol=1e-9)


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts_with_a_late_word(tmp_path_factory.mktemp("late"), (30, 50))


def with_ngrams(folder: Path, *, listed: bool = False, **changes: object) -> BlendStage:
    network = finetuning(folder, epochs=1, **changes)
    if listed:
        rows = [json.loads(line) for line in (folder / "late.jsonl").read_text().splitlines()]
        path = folder / "listed.jsonl"
        path.write_text("\n".join(json.dumps({**row, "label": [row["label"]]}) for row in rows))
        several = replace(network.labels.config, path=str(path), multi_label=True)
        network = replace(network, labels=LabelsStage(config=several))
    return blended(network)


def blended(network: Finetune) -> BlendStage:
    ngrams = NGramsStage(
        config=NGramsConfig(buckets=9973),
        tokenizer=network.tokenizer,
        labels=network.labels,
        seq_len=network.shape.seq_len,
        reading=network.config.reading,
    )
    return BlendStage(network=network, ngrams=ngrams, labels=network.labels)


def built(target: Stage[Any], home: Path) -> dict[str, Built]:
    """What was built or reused, by kind."""
    events = build([target], Store(home), submit_here)
    return {event.stage.kind: event for event in events if isinstance(event, Built)}


@pytest.mark.parametrize("settings", [{}, {"windows": 4}, {"windows": 4, "listed": True}])
def test_a_classifier_with_ngrams_is_the_better_one_and_learns_from_what_it_was_validated_on(
    late: Path, tmp_path: Path, settings: dict[str, Any]
):
    target = with_ngrams(late, **settings)
    done, store = built(target, tmp_path), Store(tmp_path)
    labels = target.labels.load(store.path("labels", done["labels"].key))
    split, measured = labels.split("validation"), done["blend"].notes["metrics"]
    files = target.load(store.path("blend", done["blend"].key))
    loaded, held_out = files.load(), files.held_out
    assert held_out is not None
    said = probabilities(loaded, split.texts)
    assert loaded.model.ngrams is not None
    fill(loaded.model.ngrams, target.ngrams.load(store.path("ngrams", done["ngrams"].key)).tables()[0])
    np.testing.assert_allclose(held_out, probabilities(loaded, split.texts), atol=1e-5)
    assert calibrated_log_loss(split.targets, held_out) == pytest.approx(measured["val/log_loss"], abs=1e-6)
    assert measured["val/log_loss"] < measured["val/network_log_loss"] + 0.01
    if "windows" in settings:  # the word that tells is in the last third, which one window does not reach
        assert measured["val/accuracy"] > measured["val/network_accuracy"] + 0.1
        assert measured["val/log_loss"] < measured["val/network_log_loss"] - 0.1
        right = np.nonzero(members(split.targets, len(labels.names)))
        assert said[right].mean() > held_out[right].mean(), "it has learned from these texts since"
    assert built(target, tmp_path / "again")["blend"].digest == done["blend"].digest


def test_what_ngrams_say_is_learned_once_whatever_network_stands_beside_them(late: Path, tmp_path: Path):
    target = with_ngrams(late)
    built(target, tmp_path)
    other = blended(replace(target.network, seed=1, config=replace(target.network.config, lr=1e-4)))
    status = {kind: event.status for kind, event in built(other, tmp_path).items()}
    assert (status["ngrams"], status["finetune"], status["blend"]) == ("reused", "built", "built")


def test_without_validation_texts_nobody_could_say_what_counts(late: Path, tmp_path: Path):
    config = LabelsConfig(path=str(late / "late.jsonl"), split=(0.8, 0.0, 0.2), validation_fraction=0.0)
    network = replace(with_ngrams(late).network, labels=LabelsStage(config=config))
    with pytest.raises(UsageError, match=r"ngrams: there are no validation texts .* ngrams to null"):
        built(blended(network), tmp_path)
