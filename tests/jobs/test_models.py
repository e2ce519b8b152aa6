"""Every way to name a model leads to its files; a name that leads nowhere is answered with the nearest."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.mlflow_client import connect, default_uri
from jobs.models import locate
from jobs.track_mlflow import sync
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.stage import Context, Stage
from tests.jobs.conftest import Corpus, Export, Pretrain, new_home, run_in


def export_of(tmp_path: Path, words: str) -> list[Any]:
    files = tmp_path / words
    files.mkdir()
    (files / "tokenizer.json").write_text(words)
    return [Export(base=Pretrain(corpus=Corpus(), steps=2), seed=len(words), files=str(files))]


def register_two_versions(home: Path) -> Path:
    """Version 1 says "one", version 2 says "second"; the newer one is the candidate."""
    for plan, words in enumerate(("one", "second")):
        sync(home, run_in(home, export_of(home.parent, words), str(plan), "clf").run, default_uri(home))
    return home


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory: pytest.TempPathFactory, database: Path) -> Path:
    return register_two_versions(new_home(tmp_path_factory.mktemp("registry"), database))


def words_of(folder: Path) -> str:
    assert (folder / "config.json").is_file()
    return (folder / "tokenizer.json").read_text()


@pytest.mark.parametrize("config", ["config.json", "model.json"])
def test_a_folder_is_itself_and_no_tracker_is_imported(tmp_path: Path, config: str) -> None:
    (tmp_path / config).touch()
    script = (
        "import sys; from pathlib import Path; from jobs.models import locate\n"
        "assert locate(sys.argv[1], Path('nowhere'), 'sqlite:///nowhere.db') == Path(sys.argv[1])\n"
        "sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False).returncode == 0


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither config\.json nor model\.json"):
        locate(str(tmp_path), tmp_path, "sqlite:///nowhere.db")


def test_every_form_of_a_name_finds_its_version(home: Path, uri: str) -> None:
    register_two_versions(home)
    assert words_of(locate("models:/clf/1", home, uri)) == "one"
    assert words_of(locate("models:/clf/2", home, uri)) == "second"
    assert words_of(locate("models:/clf@candidate", home, uri)) == "second"
    assert words_of(locate("clf@candidate", home, uri)) == "second"
    assert words_of(locate("clf", home, uri)) == "second", "the candidate, since there is no champion"

    client = connect(uri)
    client.set_registered_model_alias("clf", "champion", "1")
    assert words_of(locate("clf", home, uri)) == "one", "the champion comes first"
    client.delete_registered_model_alias("clf", "champion")
    client.delete_registered_model_alias("clf", "candidate")
    assert words_of(locate("clf", home, uri)) == "second", "the newest, since no alias is set"


@dataclass(frozen=True, kw_only=True)
class Graph(Stage[Path]):
    """An export of a classifier that transformers has no class for."""

    base: Stage[Path]

    @property
    def kind(self) -> str:
        return "export"

    def run(self, ctx: Context) -> None:
        for name in ("model.onnx", "model.json", "tokenizer.json"):
            (ctx.out / name).write_text(name)
        ctx.notes["model"] = {"role": "classifier"}

    def load(self, path: Path) -> Path:
        return path


def test_a_graph_is_registered_and_found_as_a_stock_classifier_is(home: Path, uri: str) -> None:
    sync(home, run_in(home, [Graph(base=Pretrain(corpus=Corpus(), steps=2))], "plan", "clf").run, uri)
    folder = locate("clf", home, uri)
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.onnx", "model.json", "tokenizer.json", "manifest.json"}
    assert "onnxruntime==" in (folder.parents[1] / "requirements.txt").read_text()


def test_local_files_are_used_where_they_lie(two_versions: Path) -> None:
    folder = locate("clf", two_versions, default_uri(two_versions))
    assert two_versions / "mlartifacts" in folder.parents
    assert not (two_versions / "models").exists()


@pytest.mark.parametrize(
    ("wanted", "answer"),
    [
        ("cfl", "Nearest: clf"),
        ("models:/clf@champion", "no alias 'champion'; it has: candidate"),
        ("models:/clf/7", "no version 7; it has: 1, 2"),
        ("models:/clf/seven", "names no model"),
        ("./clf/export", "names no model"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_there_is(two_versions: Path, wanted: str, answer: str) -> None:
    with pytest.raises(UsageError, match=answer):
        locate(wanted, two_versions, default_uri(two_versions))


def test_an_empty_registry_says_so(home: Path, uri: str) -> None:
    with pytest.raises(UsageError, match="Nothing is registered there"):
        locate("clf", home, uri)


def test_an_unreachable_registry_is_an_environment_problem(home: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="MLflow at http://me:") as caught:
        locate("clf", home, "http://me:hunter2@127.0.0.1:9")
    assert "hunter2" not in str(caught.value)
