"""What an MLflow store shows, in a form that two stores can be compared by."""

from pathlib import Path
from typing import Any
from urllib.request import urlopen

from jobs.mlflow_client import connect, default_uri
from pipeline.store import Store
from pipeline.tracking import read_journal
from tests.jobs.conftest import Corpus, Export, Pretrain


def toy_with_export(*, seed: int = 0, labels: tuple[str, ...] = ("",)) -> list[Any]:
    base = Pretrain(corpus=Corpus())
    return [Export(base=base, seed=seed, label=label) for label in labels]


def wait_for_first_answer(port: int) -> None:
    """A server opens its store with the first question, for which our client would wait no longer than for others."""
    with urlopen(f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1", timeout=60) as answer:
        assert answer.status == 200


def everything_in(home: Path) -> dict[str, Any]:
    return everything_in_store(default_uri(home))


def everything_in_store(uri: str) -> dict[str, Any]:
    """What a tracker holds, without the ids it made up: equal for two trackers that show the same."""
    client = connect(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = sorted(client.search_runs(experiments), key=lambda run: run.info.run_name)
    models = client.search_logged_models(experiments)
    return {
        "runs": [_shown(client, client.get_run(run.info.run_id)) for run in runs],
        "models": sorted((m.name, m.model_type, str(m.status), m.tags["gristmill.key"]) for m in models),
        "versions": sorted((v.name, str(v.version), v.tags["gristmill.key"]) for v in client.search_model_versions()),
        "aliases": {m.name: {a: str(v) for a, v in m.aliases.items()} for m in client.search_registered_models()},
    }


def _shown(client: Any, run: Any) -> dict[str, Any]:
    ours = {n: v for n, v in run.data.tags.items() if n.startswith("gristmill") and "reused_from" not in n}
    history = {name: points(client, run.info.run_id, name) for name in run.data.metrics}
    return {
        "name": run.info.run_name,
        "status": run.info.status,
        "tags": ours,
        "params": run.data.params,
        "points": history,
        "datasets": [(d.dataset.name, d.dataset.digest, d.tags[0].value) for d in run.inputs.dataset_inputs],
        "models": (len(run.inputs.model_inputs), len(run.outputs.model_outputs)),
        "files": [file.path for file in client.list_artifacts(run.info.run_id)],
    }


def points(client: Any, run_id: str, name: str) -> list[tuple[int, int, float]]:
    return sorted((m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, name))


def journal_points(home: Path, kind: str, key: str, name: str) -> list[tuple[int, int, float]]:
    journal = read_journal(Store(home).journal(kind, key))
    return sorted((p.step, p.timestamp_ms, p.metrics[name]) for p in journal if name in p.metrics)


def child_named(home: Path, name: str) -> dict[str, Any]:
    (found,) = [run for run in everything_in(home)["runs"] if run["name"] == name]
    return found
