"""What an artifact was made from, as the manifests tell it."""

import shutil
from pathlib import Path

from pipeline.ancestry import chain, made_from
from pipeline.runner import Built
from pipeline.store import Store
from tests.pipeline.data_stages import made
from tests.pipeline.toy_classifier import evaluate_of, labels_of


def test_users_come_before_what_they_use_and_the_rival_before_the_model(tmp_path: Path):
    evaluation = evaluate_of(labels_of(tmp_path / "data"), random_init=True, baselines=())
    built: Built = made(evaluation, tmp_path)
    links = chain(Store(tmp_path), [("evaluate", built.key)])
    assert [link.kind for link in links] == ["evaluate", "randomclassifier", "randomclassifier", "labels"]
    used = links[0].manifest.meta["input_keys"]
    assert [link.key for link in links[1:3]] == [used["random_init"]["key"], used["classifier"]["key"]]
    assert [link.sources != [] for link in links] == [False, False, False, True]

    shutil.rmtree(Store(tmp_path).path("randomclassifier", used["random_init"]["key"]))
    left = chain(Store(tmp_path), [("evaluate", built.key)])
    assert [link.kind for link in left] == ["evaluate", "randomclassifier", "labels"]
    assert chain(Store(tmp_path), [("evaluate", "0" * 32)]) == []


def test_a_model_was_not_made_from_what_its_evaluation_compared_it_with(tmp_path: Path):
    evaluation = evaluate_of(labels_of(tmp_path / "data"), random_init=True)
    built: Built = made(evaluation, tmp_path)
    [evaluated, *_] = chain(Store(tmp_path), [("evaluate", built.key)])
    used = {name: (each["kind"], each["key"]) for name, each in evaluated.manifest.meta["input_keys"].items()}
    assert {"baselines.0", "baselines.1", "random_init"} <= used.keys()
    inputs = {"classifier": used["classifier"], "labels": used["labels"], "evaluation": ("evaluate", built.key)}
    links = made_from(Store(tmp_path), inputs)
    assert [(link.kind, link.key) for link in links] == [inputs["evaluation"], used["classifier"], used["labels"]]
