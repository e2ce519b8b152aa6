"""The champion moves only through its gates, and no kill in between leaves a model without one."""

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.mlflow_client import connect, default_uri
from jobs.mlflow_tags import is_set_aside
from jobs.promote import Gate, Promotion, Wanted, move_aliases, promote_after_run, promote_version, roll_back
from jobs.track_mlflow import sync
from pipeline.classify import tokenize
from pipeline.errors import DataError, EnvironmentProblem, UsageError
from pipeline.stage import Context, Stage
from pipeline.stages.export import Export as RealExport
from pipeline.stages.export import ExportConfig
from pipeline.weights import ClassifierFiles, write_classifier
from tests.jobs.commands import gristmill
from tests.jobs.conftest import Corpus, Export, Pretrain, new_home, run_in
from tests.pipeline.toy_classifier import RandomClassifier, evaluate_of, labels_of


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage[Path]):
    """Scores as they are given."""

    classifier: Stage[Path]
    ours: float
    baseline: float | None = 0.5
    svm: float | None = None

    def run(self, ctx: Context) -> None:
        (ctx.out / "scores.json").write_text(json.dumps([self.ours, self.baseline, self.svm]))
        scores = {"test": self.ours, "baseline": self.baseline, "linear-svm": self.svm, "majority": 0.95}
        ctx.notes["metrics"] = {f"{name}/macro_f1": score for name, score in scores.items() if score is not None}

    def load(self, path: Path) -> Path:
        return path


@dataclass(frozen=True, kw_only=True)
class ScoredExport(Export):
    evaluation: Stage[Path]

    @property
    def kind(self) -> str:
        return "export"


def register(home: Path, ours: float, baseline: float | None = 0.5, svm: float | None = None) -> None:
    """The next version of `clf`, with these scores."""
    base = Pretrain(corpus=Corpus(), steps=2)
    export = ScoredExport(base=base, evaluation=Evaluate(classifier=base, ours=ours, baseline=baseline, svm=svm))
    sync(home, run_in(home, [export], f"{ours} {baseline} {svm}", "clf").run, default_uri(home))


def aliases(home: Path) -> dict[str, str]:
    found = connect(default_uri(home)).get_registered_model("clf").aliases
    return {alias: str(version) for alias, version in found.items()}


def promote(home: Path, **wanted: Any) -> Promotion:
    return promote_version(Wanted(name="clf", **wanted), home, default_uri(home))


def test_the_first_champion_needs_the_floor_and_the_baseline_alone(home: Path, uri: str) -> None:
    register(home, 0.8)
    done = promote(home, min_macro_f1=0.75)
    assert (done.version, done.promoted, done.previous) == ("1", True, None)
    assert [(gate.gate, gate.passed) for gate in done.gates] == [("floor", True), ("baseline", True)]
    assert aliases(home) == {"champion": "1"}
    tags = connect(uri).get_model_version("clf", "1").tags
    assert tags["gristmill.promoted_from"] == "none"
    assert tags["gristmill.promoted_at"].endswith("+00:00")
    assert tags["gristmill.gates"] == (
        "macro-F1 0.800 on its test split is at or above the floor of 0.75; "
        "macro-F1 0.800 is above the 0.500 of the baseline, TF-IDF with logistic regression"
    )


@pytest.mark.parametrize(
    ("scores", "wanted", "failed"),
    [
        ((0.8, 0.5), {"min_macro_f1": 0.81}, "macro-F1 0.800 on its test split is below the floor of 0.81"),
        ((0.8, 0.8), {}, "macro-F1 0.800 is not above the 0.800 of the baseline"),
        ((0.8, 0.5, 0.82), {}, "macro-F1 0.800 is not above the 0.820 of the best baseline, linear-svm"),
        ((0.8, None), {}, "no baseline was measured beside it"),
        ((0.8, 0.9), {"force": True, "min_macro_f1": 0.9}, "below the floor of 0.9"),
    ],
)
def test_a_gate_that_fails_changes_nothing_and_says_why(
    home: Path, uri: str, scores: tuple[float | None, ...], wanted: dict[str, Any], failed: str
) -> None:
    register(home, *scores)
    done = promote(home, **wanted)
    (verdict,) = [gate.verdict for gate in done.gates if not gate.passed]
    assert failed in verdict
    assert (done.ok, done.promoted) == (False, False)
    assert aliases(home) == {"candidate": "1"}
    assert "gristmill.promoted_at" not in connect(uri).get_model_version("clf", "1").tags


def test_losing_to_the_baseline_can_be_set_aside_and_is_told(home: Path) -> None:
    register(home, 0.8, 0.9)
    done = promote(home, force=True)
    assert done.promoted
    assert "is not above the 0.900 of the baseline" in done.gates[0].verdict
    assert done.gates[0].verdict.endswith("; set aside by --force")


def test_promoting_twice_is_promoting_once(home: Path, uri: str) -> None:
    register(home, 0.8)
    promote(home)
    tags = connect(uri).get_model_version("clf", "1").tags
    for version in (None, "1"):
        again = promote(home, version=version)
        assert (again.promoted, again.ok, again.summary) == (False, True, "clf version 1 is the champion")
    assert aliases(home) == {"champion": "1"}
    assert connect(uri).get_model_version("clf", "1").tags == tags


def test_what_is_the_champion_is_not_proposed_again_by_a_run_that_makes_it_again(home: Path, uri: str) -> None:
    register(home, 0.8)
    promote(home)
    base = Pretrain(corpus=Corpus(), steps=2)
    same = ScoredExport(base=base, evaluation=Evaluate(classifier=base, ours=0.8))
    sync(home, run_in(home, [same], "another plan", "clf").run, uri)
    assert aliases(home) == {"champion": "1"}


@pytest.mark.parametrize(
    ("name", "wanted", "why"),
    [
        ("cfl", {}, "'cfl' is neither an export folder nor a registered model of .* Nearest: clf"),
        ("clf", {"version": "7"}, "clf has no version 7; it has: 1"),
    ],
)
def test_a_model_or_version_that_is_not_there_is_refused(
    home: Path, uri: str, name: str, wanted: dict[str, str], why: str
) -> None:
    register(home, 0.8)
    with pytest.raises(UsageError, match=why):
        promote_version(Wanted(name=name, **wanted), home, uri)


def test_without_a_candidate_a_version_has_to_be_named(home: Path, uri: str) -> None:
    register(home, 0.8)
    connect(uri).delete_registered_model_alias("clf", "candidate")
    with pytest.raises(UsageError, match="has no candidate; say which version"):
        promote(home)
    assert promote(home, version="1").promoted


class Killed(BaseException):
    pass


class Dying:
    """A client whose process dies after so many changes."""

    def __init__(self, client: Any, after: int) -> None:
        self._client, self._left = client, after

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("set_", "delete_")):
            if self._left == 0:
                raise Killed
            self._left -= 1
        return getattr(self._client, name)


GATES = [Gate("baseline", True, "good enough")]


CHANGES = 6
"""Three tags, two aliases that are set, and one that goes."""


def test_a_kill_at_any_change_leaves_a_champion_and_the_way_back_and_a_retry_ends_it(
    home: Path, tmp_path: Path
) -> None:
    register(home, 0.7)
    promote(home)
    register(home, 0.8)
    for changes in range(CHANGES + 1):
        copy = tmp_path / f"killed-{changes}"
        copy.mkdir()
        shutil.copy(home / "mlflow.db", copy)
        client: Any = connect(default_uri(copy))
        try:
            move_aliases(Dying(client, changes), "clf", "2", "1", GATES)  # pyright: ignore[reportArgumentType]
            assert changes == CHANGES
        except Killed:
            left = aliases(copy)
            assert left["champion"] in ("1", "2")
            assert left["candidate"] == "2"
            assert "1" in (left["champion"], left.get("previous"))
            if left["champion"] == "2":
                promote(copy)  # nothing is compared any more
            else:
                move_aliases(client, "clf", "2", "1", GATES)
        assert aliases(copy) == {"champion": "2", "previous": "1"}


def test_another_champion_in_the_meantime_stops_a_promotion(home: Path, uri: str) -> None:
    register(home, 0.7)
    register(home, 0.8)
    promote(home, version="1")
    with pytest.raises(EnvironmentProblem, match="another champion while this one was compared"):
        move_aliases(connect(uri), "clf", "2", None, GATES)
    assert aliases(home) == {"candidate": "2", "champion": "1"}


def test_a_rollback_puts_the_previous_champion_back(home: Path, uri: str) -> None:
    register(home, 0.7)
    promote(home)
    with pytest.raises(UsageError, match=r"no previous champion to go back to; it has: champion \(version 1\)"):
        roll_back("clf", home, uri)
    register(home, 0.8)
    move_aliases(connect(uri), "clf", "2", "1", GATES)
    done = roll_back("clf", home, uri)
    assert (done.version, done.previous) == ("1", "2")
    assert aliases(home) == {"champion": "1"}
    assert "gristmill.rolled_back_at" in connect(uri).get_model_version("clf", "2").tags


def test_what_was_rolled_back_comes_back_only_when_it_is_asked_for(home: Path, uri: str) -> None:
    register(home, 0.7)
    promote(home)
    register(home, 0.8)
    move_aliases(connect(uri), "clf", "2", "1", GATES)
    roll_back("clf", home, uri)
    base = Pretrain(corpus=Corpus(), steps=2)
    same = ScoredExport(base=base, evaluation=Evaluate(classifier=base, ours=0.8))
    again = sync(home, run_in(home, [same], "another plan", "clf").run, uri)
    assert again.model_uri == "models:/clf/2"
    assert aliases(home) == {"champion": "1"}
    (refused,) = promote_after_run(["models:/clf/2"], home, uri)
    assert not refused["promoted"]
    assert "was rolled back. To promote it all the same: gristmill promote clf --version 2" in refused["summary"]
    connect(uri).delete_registered_model_alias("clf", "champion")  # or the two would be compared on texts
    assert promote(home, version="2").promoted
    since = {
        "gristmill.rolled_back_at": "2026-01-01T00:00:00+00:00",
        "gristmill.promoted_at": "2026-01-02T00:00:00+00:00",
    }
    assert not is_set_aside(since)


def test_a_run_that_may_not_promote_says_so_and_goes_on(home: Path, uri: str, caplog: pytest.LogCaptureFixture) -> None:
    register(home, 0.8, 0.9)
    with caplog.at_level(logging.INFO, "gristmill"):
        (refused,) = promote_after_run(["models:/clf/1"], home, uri)
        (unknown,) = promote_after_run([], home, uri)
        (missing,) = promote_after_run(["models:/clf/7"], home, uri)
    assert not any(done["promoted"] for done in (refused, unknown, missing))
    said = [record.getMessage() for record in caplog.records if record.name == "gristmill"]
    assert said[0].startswith("not promoted: clf version 1: macro-F1 0.800 is not above the 0.900")
    assert "MLflow has no version of it yet" in said[1]
    assert "clf has no version 7" in said[2]
    register(home, 0.9)
    (done,) = promote_after_run(["models:/clf/2"], home, uri)
    assert done["promoted"]


@dataclass(frozen=True, kw_only=True)
class FittedClassifier(RandomClassifier):
    """A random body whose head is fitted to the training texts by least squares: enough for the toy's words."""

    @property
    def kind(self) -> str:
        return "randomclassifier"

    def run(self, ctx: Context) -> None:
        super().run(ctx)
        loaded, labels = ClassifierFiles(ctx.out).load(), ctx.open(self.labels)
        split = labels.split("train")
        documents = tokenize(loaded.tokenizer, split.texts, loaded.model.cfg.seq_len)
        with torch.no_grad():
            features = torch.stack([loaded.model.body(torch.from_numpy(d).long()[None])[0, -1] for d in documents])
            wanted = torch.eye(len(labels.names))[split.targets]
            loaded.model.head.score.weight.copy_(10 * torch.linalg.lstsq(features, wanted).solution.T)
        params = dict(loaded.model.named_parameters())
        write_classifier(ctx.out, params, loaded.model.cfg, labels.names, "last", ctx.work / "tokenizer.json")


def real_export(folder: Path, classifier: type[RandomClassifier], seed: int) -> RealExport:
    labels = labels_of(folder, rows=400)
    evaluation = replace(evaluate_of(labels), classifier=classifier(labels=labels, seed=seed))
    return RealExport(
        config=ExportConfig(verify_texts=2), classifier=evaluation.classifier, labels=labels, evaluation=evaluation
    )


@pytest.fixture(scope="module")
def three_models(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Iterator[Path]:
    """Versions 1, a guess; 2, fitted; and 3, another guess."""
    folder = tmp_path_factory.mktemp("models")
    home = new_home(folder, database)
    for number, kind in enumerate((RandomClassifier, FittedClassifier, RandomClassifier)):
        targets: list[Any] = [real_export(folder / "data", kind, number)]
        sync(home, run_in(home, targets, str(number), "clf").run, default_uri(home))
    return home


@pytest.mark.slow
def test_texts_with_a_mistake_are_a_mistake_and_no_gate_even_where_nothing_is_compared(three_models: Path) -> None:
    for name in ("champion", "previous"):
        assert name not in aliases(three_models)
    with pytest.raises(DataError, match=r"typo.jsonl: no such file"):
        promote(three_models, version="1", force=True, data=three_models / "typo.jsonl")


@pytest.mark.slow
def test_the_champion_is_met_on_the_candidates_own_test_texts(three_models: Path) -> None:
    assert promote(three_models, version="1", force=True).gates[0].gate == "baseline"

    better = promote(three_models, version="2", force=True)
    assert better.promoted
    verdict = better.gates[-1].verdict
    assert "above that of the champion, version 1, on the same 100 texts" in verdict
    assert verdict.endswith("more than chance")

    worse = promote(three_models, version="3", force=True)
    assert (worse.ok, worse.gates[-1].gate, worse.gates[-1].passed) == (False, "champion", False)
    assert "below that of the champion, version 2" in worse.gates[-1].verdict
    assert aliases(three_models) == {"champion": "2", "previous": "1", "candidate": "3"}

    text = three_models / "unknown.jsonl"
    text.write_text(json.dumps({"text": "one two", "label": "no class of theirs"}) + "\n")
    with pytest.raises(DataError, match=r"unknown.jsonl:1: models:/clf/3 does not know the class 'no class of theirs'"):
        promote(three_models, version="3", force=True, data=text)


@pytest.mark.slow
def test_the_command_ends_with_4_where_a_gate_fails_and_says_it_as_json_too(home: Path) -> None:
    register(home, 0.8, 0.9)
    refused = gristmill(home, "promote", "clf", "--json")
    assert refused.returncode == 4
    assert json.loads(refused.stdout)["gates"] == [
        {
            "gate": "baseline",
            "passed": False,
            "verdict": "macro-F1 0.800 is not above the 0.900 of the baseline, TF-IDF with logistic regression",
        }
    ]
    assert refused.stderr == "clf version 1 was not promoted; nothing has been changed\n"
    nowhere = gristmill(home, "promote", "clf", "--rollback", "--force")
    assert (nowhere.returncode, nowhere.stdout) == (2, "")
