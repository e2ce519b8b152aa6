"""Which version of a registered model is the champion: gates that a candidate must pass, and the way back.

`candidate` is what the newest run proposes, `champion` what is used, `previous` the champion before it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.lineage import Lineage, of_version
from jobs.mlflow_client import alone, connect, reaching
from jobs.mlflow_tags import (
    CANDIDATE,
    CHAMPION,
    GATES,
    PREVIOUS,
    PROMOTED_AT,
    PROMOTED_FROM,
    ROLLED_BACK_AT,
    is_set_aside,
)
from jobs.models import check_registered, version_of
from pipeline.errors import DataError, EnvironmentProblem, GristmillError, UsageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

NOT_BASELINES = ("test", "random_init", "majority")
"""What else of an evaluation has a macro-F1."""

log = logging.getLogger("gristmill")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to become the champion, and what it must be. `version` None means the candidate."""

    name: str
    version: str | None = None
    min_macro_f1: float | None = None
    data: Path | None = None
    """Labelled texts on which two models are compared; None means the candidate's test split."""
    force: bool = False
    """Whether it may lose to the baseline."""


@dataclass(frozen=True)
class Gate:
    """One condition, whether it is met, and by how much, in words."""

    gate: str
    passed: bool
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What became of a promotion. `version` is the one that was asked about, `previous` the champion it took over from.

    Where it was the champion already, nothing is promoted and there are no gates.
    """

    model: str
    version: str
    promoted: bool
    summary: str
    previous: str | None = None
    gates: Sequence[Gate] = ()

    @property
    def ok(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def promote_version(wanted: Wanted, home: Path, uri: str) -> Promotion:
    """Make a version the champion if it passes every gate; else change nothing, and say which it failed.

    Raises UsageError where there is no such model, version or candidate, or nothing to compare it on, DataError where
    the given texts cannot be used, compared or not, and EnvironmentProblem where MLflow cannot be reached.
    """
    with reaching(uri):
        client = connect(uri)
        check_registered(client, wanted.name)
        aliases = _aliases(client, wanted.name)
        version = str(version_of(client, f"models:/{wanted.name}/{_chosen(wanted, aliases)}").version)
        champion = aliases.get(CHAMPION)
        if version == champion:
            _drop(client, wanted.name, CANDIDATE, version)
            summary = f"{wanted.name} version {version} is the champion"
            return Promotion(model=wanted.name, version=version, promoted=False, summary=summary)
        chain = of_version(client, client.get_model_version(wanted.name, version))
    _check_data(wanted, version, home, uri)
    gates = _gates(wanted, chain, champion, home, uri)
    refused = Promotion(
        model=wanted.name, version=version, promoted=False, previous=champion, gates=gates, summary="not promoted"
    )
    if not refused.ok:
        return refused
    with reaching(uri), alone(home):
        move_aliases(client, wanted.name, version, champion, gates)
    before = f"in place of version {champion}" if champion else "the first one"
    return Promotion(
        model=wanted.name,
        version=version,
        promoted=True,
        previous=champion,
        gates=gates,
        summary=f"{wanted.name} version {version} is the champion now, {before}",
    )


def _aliases(client: "MlflowClient", name: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def _chosen(wanted: Wanted, aliases: Mapping[str, str]) -> str:
    """The version asked for, else the candidate; else the champion, which another call has just made of it."""
    chosen = wanted.version or aliases.get(CANDIDATE) or aliases.get(CHAMPION)
    if chosen is None:
        raise UsageError(
            f"{wanted.name} has no candidate; say which version: gristmill promote {wanted.name} --version N"
        )
    return chosen


def _check_data(wanted: Wanted, version: str, home: Path, uri: str) -> None:
    """Read the given texts, if any, before a gate does: a file with a mistake in it says nothing of a model."""
    if wanted.data is None:
        return
    from jobs.assess import open_model
    from jobs.labelled import Columns, read_labelled

    model = open_model(f"models:/{wanted.name}/{version}", home, uri)
    read_labelled(wanted.data, Columns(), multi_label=model.multi_label).known_to(model.labels, model.name)


def _gates(wanted: Wanted, chain: Lineage, champion: str | None, home: Path, uri: str) -> list[Gate]:
    evaluation = chain.stage("evaluate")
    metrics = evaluation.metrics if evaluation else {}
    named = evaluation.config.get("baselines") if evaluation else None
    rivals = _rivals(metrics, named[0] if named else "TF-IDF with logistic regression")
    gates = [_baseline_gate(metrics.get("test/macro_f1"), rivals, force=wanted.force)]
    if wanted.min_macro_f1 is not None:
        gates.insert(0, _floor_gate(metrics, wanted.min_macro_f1))
    if champion is not None:
        gates.append(_champion_gate(wanted, str(chain.version), champion, home, uri))
    return gates


def _floor_gate(metrics: Mapping[str, float], floor: float) -> Gate:
    score = metrics.get("test/macro_f1")
    if score is None:
        return Gate("floor", False, "no macro-F1 of it is known: its evaluation is not on this server")
    where = "at or above" if score >= floor else "below"
    return Gate("floor", score >= floor, f"macro-F1 {score:.3f} on its test split is {where} the floor of {floor:g}")


def _rivals(metrics: Mapping[str, float], first: str) -> dict[str, float]:
    """The macro-F1 of every baseline that was measured, by its name; the metrics call the first one "baseline"."""
    found = {name: metrics[metric] for metric in metrics if (name := metric.removesuffix("/macro_f1")) != metric}
    return {first if name == "baseline" else name: f1 for name, f1 in found.items() if name not in NOT_BASELINES}


def _baseline_gate(ours: float | None, rivals: Mapping[str, float], *, force: bool) -> Gate:
    """Better than the best of the baselines."""
    aside = "; set aside by --force" if force else ""
    if ours is None or not rivals:
        return Gate("baseline", force, f"no baseline was measured beside it (see evaluate.baselines){aside}")
    name = max(rivals, key=lambda rival: rivals[rival])
    theirs = rivals[name]
    where = "above" if ours > theirs else "not above"
    best = "best baseline" if len(rivals) > 1 else "baseline"
    verdict = f"macro-F1 {ours:.3f} is {where} the {theirs:.3f} of the {best}, {name}"
    return Gate("baseline", ours > theirs or force, verdict + ("" if ours > theirs else aside))


def _champion_gate(wanted: Wanted, version: str, champion: str, home: Path, uri: str) -> Gate:
    """Not worse: the 95 % interval of the paired difference does not lie below zero as a whole."""
    from jobs.assess import compare_models

    ours, theirs = (f"models:/{wanted.name}/{number}" for number in (version, champion))
    try:
        result = compare_models(ours, theirs, wanted.data, home=home, uri=uri)
    except DataError as problem:
        remedy = "Give texts whose classes both know: --data FILE"
        return Gate(
            "champion", False, f"it cannot be compared with the champion, version {champion}: {problem}. {remedy}"
        )
    delta, (low, high) = result["delta"], result["ci"]
    where = "above" if delta > 0 else "below" if delta < 0 else "off"
    proof = "more than chance" if low > 0 or high < 0 else "which may be chance"
    verdict = (
        f"macro-F1 is {abs(delta):.3f} {where} that of the champion, version {champion}, on the same {result['n']:,} "
        f"texts (interval of the difference {low:+.3f} to {high:+.3f}), {proof}"
    )
    return Gate("champion", high >= 0, verdict)


def move_aliases(client: "MlflowClient", name: str, version: str, champion: str | None, gates: Sequence[Gate]) -> None:
    """Move the aliases, so that a kill between any two calls leaves a champion and the way back, and a retry ends it.

    `previous` first: it then names the champion that is still in place, and nothing but the one before it, which this
    promotion forgets anyway, is without an alias. Were `champion` moved first, the old one would have none. `candidate`
    goes last: as long as it is there, the same command knows what is to be done.
    """
    if _aliases(client, name).get(CHAMPION) != champion:
        raise EnvironmentProblem(f"{name} got another champion while this one was compared; promote it again")
    tags = {
        PROMOTED_AT: _now(),
        PROMOTED_FROM: champion or "none",
        GATES: "; ".join(gate.verdict for gate in gates),
    }
    for tag, value in tags.items():
        client.set_model_version_tag(name, version, tag, value)
    if champion is not None:
        client.set_registered_model_alias(name, PREVIOUS, champion)
    client.set_registered_model_alias(name, CHAMPION, version)
    _drop(client, name, CANDIDATE, version)


def _drop(client: "MlflowClient", name: str, alias: str, version: str) -> None:
    """Take an alias from a version, if it has it."""
    if _aliases(client, name).get(alias) == version:
        client.delete_registered_model_alias(name, alias)


def roll_back(name: str, home: Path, uri: str) -> Promotion:
    """Make the previous champion the champion again. The one it replaces keeps its tags, and gets one more: runs that
    make it again neither propose nor promote it; `promote_version` may.

    Raises UsageError where there is no previous one.
    """
    with reaching(uri), alone(home):
        client = connect(uri)
        check_registered(client, name)
        aliases = _aliases(client, name)
        previous, champion = aliases.get(PREVIOUS), aliases.get(CHAMPION)
        if previous is None:
            raise UsageError(f"{name} has no previous champion to go back to; it has: {_listed(aliases)}")
        if champion not in (None, previous):
            client.set_model_version_tag(name, str(champion), ROLLED_BACK_AT, _now())
        client.set_registered_model_alias(name, CHAMPION, previous)
        client.delete_registered_model_alias(name, PREVIOUS)
    summary = f"{name} version {previous} is the champion again, in place of version {champion}"
    return Promotion(model=name, version=previous, promoted=True, previous=champion, summary=summary)


def _listed(aliases: Mapping[str, str]) -> str:
    return ", ".join(f"{alias} (version {version})" for alias, version in sorted(aliases.items())) or "no alias"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def promote_after_run(model_uris: Sequence[str], home: Path, uri: str) -> list[dict[str, Any]]:
    """Promote what a run has registered. Never fails the run: what stands in the way is said, and returned."""
    if not model_uris:
        return [_not_promoted("MLflow has no version of it yet. Later: gristmill sync, then gristmill promote")]
    return [_promote_one(model_uri, home, uri) for model_uri in model_uris]


def _promote_one(model_uri: str, home: Path, uri: str) -> dict[str, Any]:
    name, version = model_uri.removeprefix("models:/").rsplit("/", 1)
    try:
        if _is_set_aside(model_uri, home, uri):
            by_hand = f"gristmill promote {name} --version {version}"
            raise UsageError(f"{name} version {version} was rolled back. To promote it all the same: {by_hand}")
        done = promote_version(Wanted(name=name, version=version), home, uri)
    except GristmillError as problem:
        return {"model": name, "version": version, **_not_promoted(str(problem))}
    if not done.ok:
        reasons = "; ".join(gate.verdict for gate in done.gates if not gate.passed)
        return done.to_json() | _not_promoted(f"{name} version {version}: {reasons}")
    log.info("%s", done.summary)
    return done.to_json()


def _is_set_aside(model_uri: str, home: Path, uri: str) -> bool:
    with reaching(uri), alone(home):
        return is_set_aside(version_of(connect(uri), model_uri).tags)


def _not_promoted(reason: str) -> dict[str, Any]:
    log.warning("not promoted: %s", reason)
    return {"promoted": False, "summary": reason}
