"""A run whose texts have several classes, or none: registered, promoted and asked; and trained by two processes."""

from pathlib import Path
from typing import Any

import pytest

from jobs.assess import compare_models
from jobs.gang_local import LocalGang
from jobs.lineage import lineage
from jobs.mlflow_client import default_uri
from jobs.use import predict
from pipeline.runner import Built, build, submit_here
from pipeline.stage import Gang, alone
from pipeline.stages.finetune import Finetune
from pipeline.store import Store
from pipeline.tracking import read_journal
from tests.jobs.commands import SMOKE, answer, gristmill
from tests.pipeline.toy_multilabel import CLASSES, rows_of, toy, written

pytestmark = pytest.mark.slow


def losses(stage: Finetune, home: Path, gang: Gang = alone) -> list[float]:
    """Of every step of a fine-tuning."""
    events = build([stage], Store(home), lambda job: submit_here(job, gang=gang))
    key = [event for event in events if isinstance(event, Built)][-1].key
    points = read_journal(Store(home).journal("finetune", key))
    return [p.metrics["train/loss"] for p in points if "train/loss" in p.metrics]


def test_two_ranks_with_shared_state_have_the_losses_of_one_also_where_one_has_no_rows(tmp_path: Path):
    settings: dict[str, Any] = {"epochs": 3, "batch_size": 11, "micro_batch_size": 2, "dropout": 0.1}
    one = toy(tmp_path, rows=240, **settings).finetune  # the 144th row is alone in the last step of an epoch
    two = toy(tmp_path, rows=240, zero_stage=2, **settings).finetune
    expected = losses(one, tmp_path / "one")
    assert len(expected) == 3 * 14
    assert losses(two, tmp_path / "two", LocalGang(2, 1)) == pytest.approx(expected, abs=1e-4)


def test_a_run_tells_its_scores_and_its_model_is_promoted_and_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = rows_of(240, noise=0.03)
    data = written(tmp_path / "toy.jsonl", rows)
    settings = {
        "corpus.path": data,
        "labels.path": data,
        "labels.multi_label": "true",
        "labels.split": "split",
        "pretrain.steps": 4,
        "finetune.epochs": 4,
        "evaluate.random_init": "false",
        "evaluate.baselines": "[linear-svm]",
        "evaluate.bootstrap": 100,
        "register.promote": "true",
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    home, uri = tmp_path / "home", default_uri(tmp_path / "home")
    result = answer(gristmill(home, "run", SMOKE, "--inline", "--json", *sets))
    assert {"accuracy", "macro_f1", "micro_f1", "ece_calibrated", "seeds"} <= result.keys()
    assert [row["promoted"] for row in result["promotions"]] == [result["macro_f1"] > result["baseline"]["macro_f1"]]
    monkeypatch.setenv("GRISTMILL_HOME", str(home))
    [said] = predict("smoke", ["iron and apple"])
    assert said.keys() == {"text", "labels", "probabilities"}
    assert said["probabilities"].keys() == CLASSES.keys()
    chain = lineage("smoke", uri).to_json()
    assert chain["labels"]["uri"] == data.resolve().as_uri()
    found = compare_models("smoke", result["export_dir"], None, home=home, uri=uri, resamples=100)
    assert found["delta"] == 0
    learned_from = {row["text"] for row in rows if row["split"] != "test"}
    left_out = [row for row in rows if row["split"] == "test" and row["text"] in learned_from]
    assert found["left_out"] == len(left_out) > 0
