"""Search for better settings of fine-tuning: Ray Tune runs the trials, Optuna chooses them, MLflow shows each.

A trial is the fine-tuning of the pipeline with other settings: an artifact like any other, so that a search that was
cut short, or asks for more, finds what was trained before. The search sees the validation texts only.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.home import home
from jobs.launch_ray import RayOptions, connected, on_ray
from jobs.mlflow_client import alone, connect, quiet, reaching
from jobs.mlflow_tags import KEY, PLAN, STAGE
from jobs.run import open_config, tracking_uri
from jobs.search_space import OneOf, Space, parse, usual
from pipeline.assemble import Branch
from pipeline.errors import EnvironmentProblem, GristmillError, StageFailed, UsageError
from pipeline.identity import fingerprint
from pipeline.runner import Built, build, submit_here
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
        own = [f"{key}={value}" for key, value in settings.items()]
        return open_config(self.path, [*self.overrides, *own]).graph.branches[self.task]


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
    space = parse(words) if words else usual(opened.config, section)
    all_cpus = opened.config.cluster.cpus or len(os.sched_getaffinity(0))
    search = Search(path.resolve(), tuple(overrides), chosen, metric, opened.store, max(1, all_cpus // parallel))
    search.branch({key: _first(values) for key, values in space.items()})  # a wrong key is refused before any work
    say(f"searching {', '.join(space)} for the best validation {metric}: {trials} trials, {parallel} at a time")
    address = opened.config.cluster.address or os.environ.get("RAY_ADDRESS")
    options = RayOptions(home=opened.store.home, cpus=all_cpus, address=address)
    with on_ray(options) as submit:
        needed = list(opened.graph.branches[chosen].finetune.inputs.values())
        for event in build(needed, opened.store, submit, cpus=all_cpus):
            if isinstance(event, Built) and event.status == "built":
                say(f"built {event.stage.name} in {event.seconds:.0f} s")
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


def _first(values: Any) -> Any:
    return values.values[0] if isinstance(values, OneOf) else values.low


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
        stage = search.branch(settings).finetune
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
        client = connect(uri)
        number = experiment_named(client, home(), name).experiment_id
        parent = client.create_run(number, tags={STAGE: "tune", PLAN: plan}, run_name=f"tune {search.task or name}")
        for trial in trials:
            tags = {"mlflow.parentRunId": parent.info.run_id, STAGE: "tune-trial", KEY: trial.key}
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


def print_search(result: Mapping[str, Any], path: Path) -> None:
    """The trials, the best first, and the command that uses it."""
    table = Table(box=None, pad_edge=False)
    for column in ("trial", f"val {result['metric']}", "seconds", "settings"):
        table.add_column(column)
    for trial in result["trials"]:
        value = "failed" if trial["value"] is None else f"{trial['value']:.4f}"
        table.add_row(str(trial["number"] + 1), value, f"{trial['seconds']:.0f}", _words(trial["settings"]))
    console = Console(highlight=False)
    console.print(table)
    best = " ".join(f"--set {key}={value}" for key, value in result["best"].items())
    console.print(f"\nThe best, which is trained already:\n  gristmill run {path} {best}", soft_wrap=True)
