"""Searching for settings of fine-tuning."""

from pathlib import Path
from typing import Any

import pytest

from jobs.lineage import lineage
from jobs.mlflow_client import connect, default_uri
from jobs.search_space import Between, OneOf, parse, usual
from jobs.tune import print_search, shared, written
from pipeline.assemble import assemble
from pipeline.config import load
from pipeline.errors import UsageError
from pipeline.pipeline_config import PipelineConfig
from pipeline.stages.finetune import FinetuneConfig

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


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({}, {"lr", "muon_lr"}),
        ({"optimizer": "adamw"}, {"lr"}),
        ({"muon_lr": None}, {"lr"}),
        ({"method": "lora"}, {"lr"}),
        ({"method": "head"}, {"head_lr"}),
        ({"method": "head", "head_lr": None}, {"lr"}),
    ],
)
def test_the_usual_space_lies_around_the_rates_that_the_method_reads(changes: dict[str, Any], rates: set[str]):
    finetune = FinetuneConfig(**changes)
    space = usual(finetune, "tasks.a.finetune")
    assert set(space) == {f"tasks.a.finetune.{name}" for name in (*rates, "dropout")}
    for name in rates:
        rate = getattr(finetune, name)
        assert space[f"tasks.a.finetune.{name}"] == Between(rate / 4, rate * 4, log=True)


def test_what_comes_before_the_network_is_made_once_for_all_trials():
    branch = assemble(load(PipelineConfig, Path(SMOKE), ["ngrams={}", "evaluate.seeds=2"]).config).branches[""]
    names = {stage.name for stage in shared(branch)}
    assert names == {"corpus", "tokenizer", "shards", "pretrain", "labels", "ngrams"}


def test_what_a_trial_sets_is_what_the_config_gets():
    settings = {
        "finetune.head_lr": None,
        "finetune.lr": 1e-5,
        "finetune.pooling": "last",
        "finetune.bidirectional": True,
    }
    finetune = load(PipelineConfig, Path("configs/smoke.yaml"), written(settings)).config.finetune
    assert (finetune.head_lr, finetune.lr, finetune.pooling, finetune.bidirectional) == (None, 1e-5, "last", True)


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
    chain = lineage(after["run"], default_uri(tmp_path))
    assert {"finetune", "labels", "pretrain", "corpus"} <= {stage.kind for stage in chain.stages}


@pytest.mark.slow
def test_a_search_without_validation_texts_is_refused_before_anything_is_trained(tmp_path: Path):
    none = ["--set", "labels.split=[0.8, 0.0, 0.2]", "--set", "labels.validation_fraction=0"]
    done = gristmill(tmp_path, "tune", SMOKE, "--trials", "1", *none)
    assert done.returncode == 2
    assert "no validation texts to compare trials by: set labels.validation_fraction" in done.stderr
    assert not (tmp_path / "store" / "pretrain").exists()


def test_the_command_to_run_the_best_has_the_overrides_of_the_search(capsys: pytest.CaptureFixture[str]):
    trial = {"number": 0, "value": 0.5, "seconds": 1.0, "settings": {"finetune.muon_lr": None}}
    found = {"metric": "macro_f1", "trials": [trial], "best": trial["settings"]}
    print_search(found, Path("a.yaml"), ["labels.path=my file.csv"])
    assert "gristmill run a.yaml --set 'labels.path=my file.csv' --set finetune.muon_lr=null" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--trials", "--parallel"])
def test_no_trial_is_no_search(option: str, tmp_path: Path):
    done = gristmill(tmp_path, "tune", SMOKE, option, "0")
    assert done.returncode == 2
    assert "Must be >= 1" in done.stderr


def test_a_task_that_is_not_there_is_refused(tmp_path: Path):
    done = gristmill(tmp_path, "tune", SMOKE, "--task", "other")
    assert done.returncode == 2
    assert "--task other: the config has one task only, so leave --task out" in done.stderr


def test_a_search_over_a_key_that_changes_nothing_is_refused_before_any_work(tmp_path: Path):
    done = gristmill(tmp_path, "tune", SMOKE, "--search", "finetune.lr=1e-4,1e-3", "--search", "evaluate.seeds=1:3")
    assert done.returncode == 2
    assert "--search evaluate.seeds: the classifier is the same with 1 and 3, so leave it out" in done.stderr
    assert not (tmp_path / "store").exists()


def test_a_search_over_a_key_that_is_not_there_is_refused_before_any_work(tmp_path: Path):
    done = gristmill(tmp_path, "tune", SMOKE, "--search", "finetune.lrr=1e-4,1e-3")
    assert done.returncode == 2
    assert "finetune.lrr: unknown key. Did you mean `lr`?" in done.stderr
    assert not (tmp_path / "store").exists()
