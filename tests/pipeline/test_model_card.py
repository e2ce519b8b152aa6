"""The card of an export: what a person should know before using it, and metadata that the hub's tools can read."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from pipeline.ancestry import Link, chain
from pipeline.model_card import ModelFacts, model_card
from pipeline.runner import Built
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.export import Export, ExportConfig
from pipeline.store import Store
from pipeline.windows import Windows
from tests.pipeline.data_stages import made
from tests.pipeline.toy_classifier import evaluate_of, labels_of


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluate:
    return evaluate_of(labels_of(tmp_path_factory.mktemp("data")), random_init=True)


@pytest.fixture(scope="module")
def built(evaluation: Evaluate, home: Path) -> Built:
    return made(evaluation, home)


@pytest.fixture(scope="module")
def scores(evaluation: Evaluate, built: Built, home: Path) -> dict[str, Any]:
    return evaluation.load(Store(home).path("evaluate", built.key)).scores


@pytest.fixture(scope="module")
def links(built: Built, home: Path) -> list[Link]:
    return chain(Store(home), [("evaluate", built.key)])


@pytest.fixture(scope="module")
def facts(links: list[Link]) -> ModelFacts:
    return ModelFacts(
        parameters=1234,
        seq_len=24,
        language="en",
        license="apache-2.0",
        data_digest="d" * 32,
        checked=18,
        tolerance=1e-5,
        stock=True,
        programs="transformers",
        temperature=1.7,
        chain=links,
    )


def test_the_metadata_survives_the_hubs_own_reader(scores: dict[str, Any], facts: ModelFacts, tmp_path: Path):
    (tmp_path / "README.md").write_text(model_card(scores, facts))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.language, data.license, data.library_name) == ("en", "apache-2.0", "transformers")
    assert data.pipeline_tag == "text-classification"
    by_type = {result.metric_type: result for result in data.eval_results or []}
    assert by_type["accuracy"].metric_value == scores["accuracy"]
    assert (by_type["f1"].metric_value, by_type["f1"].metric_args) == (scores["macro_f1"], {"average": "macro"})
    assert by_type["f1"].dataset_revision == "d" * 32


def test_the_chain_has_the_key_and_the_content_of_every_stage_and_of_the_raw_data(
    scores: dict[str, Any], facts: ModelFacts, links: list[Link]
):
    text = model_card(scores, facts)
    assert {link.kind for link in links} == {"evaluate", "randomclassifier", "baseline", "labels"}
    for link in links:
        assert f"| {link.kind} | `{link.key}` | `{link.manifest.digest}` |" in text
    [source] = links[-1].sources
    assert f"labels `{source['digest']}`." in text
    assert source["source"] not in text, "a path of this machine would make other bytes on another"
    assert "What it was made from" not in model_card(scores, replace(facts, chain=()))


def test_an_export_names_what_it_was_made_from_and_not_what_it_was_compared_with(evaluation: Evaluate, home: Path):
    export = Export(
        config=ExportConfig(verify_texts=1),
        classifier=evaluation.classifier,
        labels=evaluation.labels,
        evaluation=evaluation,
    )
    built = made(export, home)
    text = (Store(home).path("export", built.key) / "README.md").read_text()
    manifest = Store(home).find("export", built.key)
    assert manifest is not None
    for needed in manifest.meta["input_keys"].values():
        assert f"| {needed['kind']} | `{needed['key']}` | `{needed['digest']}` |" in text
    assert text.count("| randomclassifier |") == 1
    assert "| baseline |" not in text


def test_scores_stand_beside_their_intervals_and_the_baseline(scores: dict[str, Any], facts: ModelFacts):
    text = model_card(scores, facts)
    low, high = scores["macro_f1_ci"]
    assert f"| {scores['macro_f1']:.3f} | {low:.3f} to {high:.3f} |" in text
    assert f"| {scores['baseline']['macro_f1']:.3f} |" in text
    assert "| TF-IDF + logistic regression |" in text


def test_probabilities_are_told_as_trained_and_as_served(scores: dict[str, Any], facts: ModelFacts):
    calibrated = {"ece": 0.0123, "log_loss": 0.4567, "brier": 0.2345}
    text = model_card({**scores, "calibrated": calibrated}, facts)
    assert f"| as trained | {scores['ece']:.3f} |" in text
    assert "| of this export, at temperature 1.700 | 0.012 | 0.457 | 0.234 |" in text
    assert "of this export" not in model_card({**scores, "calibrated": calibrated}, replace(facts, temperature=1.0))


def test_use_and_limits_are_told(scores: dict[str, Any], facts: ModelFacts):
    text = model_card(scores, facts)
    assert "texts in the language `en` like those it was tested on" in text
    assert "the first 24 tokens" in text
    worst = min(scores["per_class"], key=lambda row: row["f1"])
    assert f"(F1 {worst['f1']:.3f})" in text
    assert "in the language" not in model_card(scores, replace(facts, language=None))


def test_what_did_better_is_named_and_a_class_without_test_texts_is_not_called_weak(
    scores: dict[str, Any], facts: ModelFacts
):
    leads = {"tfidf-logreg": 0.1, "linear-svm": -0.1}
    baselines = [{**scores["baselines"][0], "name": name, "lead": lead} for name, lead in leads.items()]
    missing = {**scores["per_class"][0], "name": "missing", "f1": 0.0, "support": 0}
    text = model_card({**scores, "baselines": baselines, "per_class": [*scores["per_class"], missing]}, facts)
    assert "Ahead of it on this test set, and trained in seconds: linear SVM over words and characters." in text
    assert "least reliable for missing" not in text
    baselines[1]["lead"] = 0.0
    assert "Ahead of it" not in model_card({**scores, "baselines": baselines}, facts)


def test_windows_are_told_with_what_the_export_alone_does_not_do(scores: dict[str, Any], facts: ModelFacts):
    text = " ".join(model_card(scores, replace(facts, windows=Windows(3, 4))).split())
    assert (
        "- A text of more than 24 tokens is read in up to 3 windows of 24 tokens, neighbours sharing 4, whose" in text
    )
    assert "a program that reads this export alone, which computes one window, must do so itself" in text
    assert "the first 24 tokens" not in text
    assert "windows" not in model_card(scores, facts)
    assert "sharing" not in model_card(scores, replace(facts, windows=Windows(3)))


def test_test_texts_that_were_met_before_are_counted(scores: dict[str, Any], facts: ModelFacts):
    leaks = {"corpus": {"n": 7}, "training": {"n": 2}}
    text = model_card({**scores, "contamination": leaks}, facts)
    assert f"7 of {scores['n']} test texts stand in the corpus of the pretraining;" in text
    assert f"2 of {scores['n']} test texts stand in the texts it was trained or validated on." in text
    assert "stand in" not in model_card({**scores, "contamination": None}, facts)
