"""Searching for settings of fine-tuning."""

from pathlib import Path

import pytest

from jobs.mlflow_client import connect, default_uri
from jobs.search_space import Between, OneOf, parse, usual
from pipeline.config import load
from pipeline.errors import UsageError
from pipeline.pipeline_config import PipelineConfig

from .commands import SMOKE, answer, gristmill, keys, run, statuses


def test_a_space_is_read_from_words():
    assert parse(["a.lr=log:1e-4:1e-2", "a.epochs=2:6", "a.pooling=last,mean", "a.dropout=0.0,0.1", "a.on=true"]) == {
        "a.lr": Between(1e-4, 1e-2, log=True),
        "a.epochs": Between(2, 6),
        "a.pooling": OneOf(("last", "mean")),
        "a.dropout": OneOf((0.0, 0.1)),
        "a.on": OneOf((True,)),
    }


@pytest.mark.parametrize("word", ["a", "a=", "=1", "a=2:1", "a=log:0:1", "a=lin:1:2", "a=x:y", "a=1:2:3:4", "a={,1"])
def test_a_word_that_is_no_space_is_refused_by_its_number(word: str):
    with pytest.raises(UsageError, match=r"--search #2  .*(write|log needs|YAML)"):
        parse(["a.lr=1:2", word])


def test_the_usual_space_lies_around_the_configured_rates():
    config = load(PipelineConfig, Path("configs/quickstart.yaml")).config
    space = usual(config, "finetune")
    assert space["finetune.lr"] == Between(config.finetune.lr / 4, config.finetune.lr * 4, log=True)
    assert set(space) == {"finetune.lr", "finetune.muon_lr", "finetune.dropout"}


@pytest.mark.slow
def test_a_search_finds_the_best_of_its_trials_shows_them_and_the_run_uses_what_was_trained(tmp_path: Path):
    search = ["tune", SMOKE, "--json", "--trials", "3", "--search", "finetune.lr=1e-5,5e-3"]
    found = answer(gristmill(tmp_path, *search, "--set", "evaluate.random_init=false"))
    values = [trial["value"] for trial in found["trials"]]
    assert len(values) == 3
    assert found["value"] == max(values) == values[0]
    best = [f"{key}={value}" for key, value in found["best"].items()]
    after = run(tmp_path, *best, "evaluate.random_init=false")
    assert statuses(after)["finetune"] == "reused"
    assert keys(after)["finetune"] == found["trials"][0]["key"]
    client = connect(default_uri(tmp_path))
    experiment = client.get_experiment_by_name("smoke")
    children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{found['mlflow_run_id']}'")
    assert sorted(run.data.metrics["val/macro_f1"] for run in children) == pytest.approx(sorted(values))
    assert {run.data.params["finetune.lr"] for run in children} <= {"1e-05", "0.005"}


def test_a_task_that_is_not_there_is_refused(tmp_path: Path):
    done = gristmill(tmp_path, "tune", SMOKE, "--task", "other")
    assert done.returncode == 2
    assert "--task other: the config has one task only, so leave --task out" in done.stderr


def test_a_search_over_a_key_that_is_not_there_is_refused_before_any_work(tmp_path: Path):
    done = gristmill(tmp_path, "tune", SMOKE, "--search", "finetune.lrr=1e-4,1e-3")
    assert done.returncode == 2
    assert "finetune.lrr: unknown key. Did you mean `lr`?" in done.stderr
    assert not (tmp_path / "store").exists()
