"""Search for better settings of fine-tuning: Ray Tune runs the trials, Optuna chooses them, MLflow shows each.

A trial is the classifier of the pipeline with other settings, n-grams included: an artifact like any other, so that a
search that was cut short, or asks for more, finds what was trained before. It sees the validation texts only.
"""

import importlib.util
import json
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.home import home
from jobs.launch_ray import RayOptions, connected, on_ray
from jobs.mlflow_client import alone, connect, quiet, reaching
from jobs.mlflow_tags import PLAN, STAGE, TRIED
from jobs.run import open_config, tracking_uri
from jobs.search_space import OneOf, Space, parse, usual
from pipeline.assemble import Branch, Classifier
from pipeline.errors import EnvironmentProblem, GristmillError, StageFailed, UsageError
from pipeline.identity import fingerprint
from pipeline.runner import Built, build, submit_here, topological
from pipeline.stage import Stage
from pipeline.stages.labels import Labels
from pipeline.store import Store

Say = Callable[[str], None]


@dataclass(frozen=True)
class Search:
    """What is to be tried on which pipeline. `task` is "" where the pipeline has one task."""

    path: Path
    overrides: tuple[str, ...]
    task: str
    metric: str
    store: Store
    cpus: int

    def branch(self, settings: Mapping[str, Any]) -> Branch:
        return open_config(self.path, [*self.overrides, *written(settings)]).graph.branches[self.task]


def written(settings: Mapping[str, Any]) -> list[str]:
    """Settings as `--set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


@dataclass(frozen=True)
class Trial:
    """One set of settings and what it came to; `value` is None where the training failed."""

    number: int
    settings: dict[str, Any]
    value: float | None
    key: str = ""
    seconds: float = 0.0
    error: str = ""


def tune(
    path: Path,
    overrides: Sequence[str],
    *,
    words: Sequence[str],
    trials: int,
    parallel: int,
    metric: str,
    task: str | None,
    seed: int,
    say: Say,
) -> dict[str, Any]:
    """Run a search; `{"best", "value", "metric", "trials": [...], "mlflow_run_id", "seconds"}`, best trial first."""
    began = time.monotonic()
    quiet()
    _check_installed()
    opened = open_config(path, overrides)
    chosen = _task(list(opened.graph.branches), task)
    section = f"tasks.{chosen}.finetune" if chosen else "finetune"
    space = parse(words) if words else usual(opened.config.all_tasks[chosen].finetune, section)
    branch = opened.graph.branches[chosen]
    all_cpus = opened.config.cluster.cpus or len(os.sched_getaffinity(0))
    search = Search(path.resolve(), tuple(overrides), chosen, metric, opened.store, max(1, all_cpus // parallel))
    _check(search, space)
    say(f"searching {', '.join(space)} for the best validation {metric}: {trials} trials, {parallel} at a time")
    address = opened.config.cluster.address or os.environ.get("RAY_ADDRESS")
    options = RayOptions(home=opened.store.home, cpus=all_cpus, address=address)
    with on_ray(options) as submit:
        for event in build(shared(branch), opened.store, submit, cpus=all_cpus):
            if not isinstance(event, Built):
                say(f"building {event.stage.name}")
                continue
            if event.status == "built":
                say(f"built {event.stage.name} in {event.seconds:.0f} s")
            if event.stage == branch.labels:
                _check_validation(branch.labels.load(opened.store.open(event.stage.kind, event.key)))
        connected(options)
        done = _run(search, space, trials, parallel, seed, say)
    ranked = sorted(done, key=lambda trial: (trial.value is None, -(trial.value or 0.0), trial.number))
    if ranked[0].value is None:
        raise StageFailed(f"all {len(ranked)} trials failed. The first: {ranked[0].error}")
    run_id = _logged(opened.config.name, search, done, tracking_uri(opened.config), say)
    return {
        "best": ranked[0].settings,
        "value": ranked[0].value,
        "metric": metric,
        "trials": [vars(trial) for trial in ranked],
        "mlflow_run_id": run_id,
        "seconds": round(time.monotonic() - began, 2),
    }


def _check_installed() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise EnvironmentProblem("gristmill tune needs optuna: pip install 'gristmill[tune]'")


def _task(known: list[str], wanted: str | None) -> str:
    if not known:
        raise UsageError("the config has no labels, so there is nothing to fine-tune")
    if wanted is None and len(known) == 1:
        return known[0]
    if wanted is None or wanted not in known:
        there = ", ".join(name for name in known if name) or "one task only, so leave --task out"
        raise UsageError(f"--task {wanted or 'is missing'}: the config has {there}")
    return wanted


def _check(search: Search, space: Space) -> None:
    """Raises UsageError, before any work, for a key that is wrong, and for one that changes nothing."""
    first = {key: values.ends[0] for key, values in space.items()}
    for key, values in space.items():
        low, high = values.ends
        if low != high and _classifier(search, {**first, key: high}) == search.branch(first).classifier:
            raise UsageError(f"--search {key}: the classifier is the same with {low} and {high}, so leave it out")


def _classifier(search: Search, settings: Mapping[str, Any]) -> Classifier | None:
    """None where the settings are refused: their trials will fail, and say why."""
    with suppress(UsageError):
        return search.branch(settings).classifier


def shared(branch: Branch) -> list[Stage[Any]]:
    """What trials need not make anew: all but the network and its blend with n-grams."""
    return [stage for stage in topological([branch.classifier]) if stage not in (branch.finetune, branch.classifier)]


def _check_validation(labels: Labels) -> None:
    if not labels.split("validation").texts:
        raise UsageError("there are no validation texts to compare trials by: set labels.validation_fraction above 0")


def _run(search: Search, space: Space, trials: int, parallel: int, seed: int, say: Say) -> list[Trial]:
    import optuna
    from ray import tune as ray_tune
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.environ |= {"RAY_AIR_NEW_OUTPUT": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0", **os.environ}
    heard = _Told(say, trials)
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(_try, search=search), {"cpu": search.cpus}),
        param_space={key: _domain(values) for key, values in space.items()},
        tune_config=ray_tune.TuneConfig(
            search_alg=OptunaSearch(metric="value", mode="max", seed=seed),
            metric="value",
            mode="max",
            num_samples=trials,
            max_concurrent_trials=parallel,
        ),
        run_config=ray_tune.RunConfig(
            storage_path=str((search.store.home / "tune").resolve()), verbose=0, callbacks=[heard.callback()]
        ),
    )
    tuner.fit()
    return heard.trials


def _domain(values: Any) -> Any:
    from ray import tune as ray_tune

    if isinstance(values, OneOf):
        return ray_tune.choice(list(values.values))
    whole = isinstance(values.low, int) and isinstance(values.high, int)
    if whole:
        return (
            ray_tune.lograndint(values.low, values.high + 1)
            if values.log
            else ray_tune.randint(values.low, values.high + 1)
        )
    return ray_tune.loguniform(values.low, values.high) if values.log else ray_tune.uniform(values.low, values.high)


def _try(settings: dict[str, Any], search: Search) -> None:
    """One trial, in a process of its own. What we refuse or what fails is a trial without a value, not a crash."""
    from ray import tune as ray_tune

    start = time.monotonic()
    try:
        stage = search.branch(settings).classifier
        events = build([stage], search.store, lambda job: submit_here(job, cpus=search.cpus), cpus=search.cpus)
        built = [event for event in events if isinstance(event, Built)][-1]
    except GristmillError as error:
        ray_tune.report({"value": float("-inf"), "error": str(error), "spent": time.monotonic() - start})
        return
    value = built.notes["metrics"][f"val/{search.metric}"]
    ray_tune.report({"value": value, "key": built.key, "spent": time.monotonic() - start})


class _Told:
    """Hears of every trial as it ends, and says so."""

    def __init__(self, say: Say, total: int) -> None:
        self.trials: list[Trial] = []
        self._say, self._total = say, total

    def callback(self) -> Any:
        from ray.tune import Callback

        told = self

        class Hearing(Callback):
            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                del iteration, trials, info
                told._hear(trial.config, trial.last_result)

            def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                del iteration, trials, info
                told._hear(trial.config, {"value": float("-inf"), "error": f"its process failed; see {trial.path}"})

        return Hearing()

    def _hear(self, settings: dict[str, Any], result: Mapping[str, Any]) -> None:
        value = None if result["value"] == float("-inf") else result["value"]
        number = len(self.trials)
        trial = Trial(
            number,
            dict(settings),
            value,
            result.get("key", ""),
            round(result.get("spent", 0.0), 2),
            result.get("error", ""),
        )
        self.trials.append(trial)
        shown = f"{value:.4f}" if value is not None else f"failed: {trial.error}"
        self._say(f"trial {number + 1} of {self._total}: {shown}  {_words(trial.settings)}")


def _words(settings: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def _logged(name: str, search: Search, trials: Sequence[Trial], uri: str, say: Say) -> str | None:
    """As `_log`; where MLflow is away, that is said and the search is shown all the same."""
    try:
        return _log(name, search, trials, uri)
    except EnvironmentProblem as problem:
        say(f"{problem}\nThe search is not in MLflow. The same command logs it: its trials are trained already")
        return None


def _log(name: str, search: Search, trials: Sequence[Trial], uri: str) -> str:
    """A parent run for the search and a child for every trial; the id of the parent."""
    from jobs.mlflow_runs import experiment_named

    plan = fingerprint({"config": str(search.path), "overrides": list(search.overrides), "task": search.task})
    with reaching(uri), alone(home()):
        client = connect(uri, create=True)
        number = experiment_named(client, home(), name).experiment_id
        parent = client.create_run(number, tags={STAGE: "tune", PLAN: plan}, run_name=f"tune {search.task or name}")
        for trial in trials:
            tags = {"mlflow.parentRunId": parent.info.run_id, STAGE: "tune-trial", TRIED: trial.key}
            child = client.create_run(number, tags=tags, run_name=f"trial-{trial.number + 1:03d}")
            for key, value in trial.settings.items():
                client.log_param(child.info.run_id, key, value)
            if trial.value is not None:
                client.log_metric(child.info.run_id, f"val/{search.metric}", trial.value)
            client.set_terminated(child.info.run_id, "FAILED" if trial.value is None else "FINISHED")
        best = max(trial.value for trial in trials if trial.value is not None)
        client.log_metric(parent.info.run_id, f"best/val/{search.metric}", best)
        client.set_terminated(parent.info.run_id)
    return parent.info.run_id


def print_search(result: Mapping[str, Any], path: Path, overrides: Sequence[str]) -> None:
    """The trials, the best first, and the command that uses it, with the overrides that the search had."""
    table = Table(box=None, pad_edge=False)
    for column in ("trial", f"val {result['metric']}", "seconds", "settings"):
        table.add_column(column)
    for trial in result["trials"]:
        value = "failed" if trial["value"] is None else f"{trial['value']:.4f}"
        table.add_row(str(trial["number"] + 1), value, f"{trial['seconds']:.0f}", _words(trial["settings"]))
    console = Console(markup=False, highlight=False)
    console.print(table)
    sets = [part for setting in (*overrides, *written(result["best"])) for part in ("--set", setting)]
    command = shlex.join(["gristmill", "run", str(path), *sets])
    console.print(f"\nThe best, which is trained already:\n  {command}", soft_wrap=True)
