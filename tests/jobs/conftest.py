"""A home with a toy pipeline in it: real stages, real journals, and an MLflow database that is made once and copied."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from jobs.mlflow_client import connect, default_uri
from jobs.record import Record, open_record
from jobs.track_mlflow import Mirror
from pipeline.identity import knob
from pipeline.runner import Started, build, submit_here, topological
from pipeline.stage import Context, Stage
from pipeline.store import Store


@dataclass(frozen=True, kw_only=True)
class Corpus(Stage[Path]):
    text: str = "some words"

    def run(self, ctx: Context) -> None:
        (ctx.out / "corpus.txt").write_text(self.text)
        ctx.notes["datasets"] = [{"name": "toy", "source": "/data/toy.txt", "digest": "d" * 64, "context": "training"}]

    def load(self, path: Path) -> Path:
        return path


@dataclass(frozen=True, kw_only=True)
class Pretrain(Stage[Path]):
    corpus: Stage[Path]
    steps: int = 40
    breaks_at: int = knob(-1)

    def run(self, ctx: Context) -> None:
        for step in range(self.steps):
            if step == self.breaks_at:
                raise RuntimeError("a toy that breaks")
            ctx.tracker.metrics({"train/loss": 1 / (step + 1), "train/lr": 3e-4}, step=step)
        (ctx.out / "plots").mkdir()
        (ctx.out / "plots" / "loss.txt").write_text("a plot")
        ctx.notes.update({"metrics": {"val/loss": 1.5}, "files": ["plots/loss.txt"], "model": {"role": "base"}})

    def load(self, path: Path) -> Path:
        return path


@dataclass(frozen=True, kw_only=True)
class Export(Stage[Path]):
    base: Stage[Path]
    seed: int = 0
    files: str = knob("")

    def run(self, ctx: Context) -> None:
        if self.files:
            shutil.copytree(self.files, ctx.out, dirs_exist_ok=True)
        (ctx.out / "config.json").touch()
        ctx.notes["model"] = {"role": "classifier"}

    def load(self, path: Path) -> Path:
        return path


def toy_pipeline(**pretrain: int) -> list[Stage[Path]]:
    return [Pretrain(corpus=Corpus(), **pretrain)]


Run = Callable[..., Record]


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, made once for all the processes of a test session."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared
    with FileLock(shared / "database.lock"):
        connect(f"sqlite:///{shared}/template.db", create=True)
    return shared / "template.db"


def new_home(folder: Path, database: Path) -> Path:
    home = folder / "home"
    home.mkdir()
    shutil.copy(database, home / "mlflow.db")
    return home


@pytest.fixture
def home(tmp_path: Path, database: Path) -> Path:
    return new_home(tmp_path, database)


@pytest.fixture
def uri(home: Path) -> str:
    return default_uri(home)


def run_in(
    home: Path,
    targets: list[Stage[Path]] | None = None,
    plan: str = "plan",
    register_name: str | None = None,
    follow: Callable[[str], Mirror] | None = None,
) -> Record:
    """Run a toy pipeline as a driver does, and give back its record. `follow` makes what mirrors it, given its name."""
    targets = targets or toy_pipeline()
    stages = [(stage.name, stage.kind) for stage in topological(targets)]
    params = {"pretrain.steps": 40, "lr": 3e-4}
    with open_record(home, "toy", plan, stages=stages, params=params, register_name=register_name, cpus=2) as opened:
        mirror = follow(opened.record.run).start() if follow else None
        for event in build(targets, Store(home), submit_here):
            if isinstance(event, Started):
                opened.started(event.stage.name, event.key)
            else:
                opened.ended(event.stage.name, event.key, event.status, event.seconds)
        opened.finish("succeeded", {"accuracy": 0.9, "status": "succeeded"})
        if mirror:
            mirror.finish(20)
    return opened.record


@pytest.fixture
def run_toy(home: Path) -> Run:
    return partial(run_in, home)
