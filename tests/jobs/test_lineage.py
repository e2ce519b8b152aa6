"""A registered model tells what it was made from, down to the bytes of the raw data, to people and to programs."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from jobs.lineage import lineage
from jobs.mlflow_client import connect
from jobs.mlflow_tags import LONGEST_TAG, config_of, inputs_of, inputs_tags, params_of, sources_text
from jobs.models import locate
from jobs.record import Record
from jobs.show_lineage import print_lineage
from jobs.track_mlflow import sync
from pipeline import sources
from pipeline.assemble import assemble
from pipeline.config import load
from pipeline.errors import UsageError
from pipeline.identity import knob
from pipeline.pipeline_config import PipelineConfig
from pipeline.runner import topological
from pipeline.stage import Context, Stage
from pipeline.stages.corpus import CorpusConfig, CorpusStage
from pipeline.store import Store
from tests.jobs.commands import answer, gristmill, keys, run
from tests.jobs.conftest import Corpus, Export, Pretrain, Run

TEXT = "some words\nand others\n"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "raw.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def registered(home: Path, uri: str, raw: Path, run_toy: Run) -> Record:
    """A toy pipeline over a real corpus, shown in MLflow. The artifacts are gone, so that only the server can tell."""
    base = Pretrain(corpus=CorpusStage(config=CorpusConfig(path=str(raw))))
    record = run_toy([Export(base=base)], register_name="clf")
    sync(home, record.run, uri)
    shutil.rmtree(home / "store")
    return record


def test_a_program_walks_from_the_alias_to_the_bytes_of_the_corpus_with_mlflow_alone(
    uri: str, raw: Path, registered: Record
) -> None:
    from mlflow import MlflowClient

    del registered
    client = MlflowClient(uri, registry_uri=uri)
    version = client.get_model_version_by_alias("clf", "candidate")
    seen = [client.get_run(version.run_id)]
    while seen[-1].inputs.model_inputs:
        model = client.get_logged_model(seen[-1].inputs.model_inputs[0].model_id)
        seen.append(client.get_run(model.source_run_id))
    while used := json.loads(seen[-1].data.tags["gristmill.inputs"]):
        (key,) = [needed["key"] for needed in used.values()]
        seen += client.search_runs([seen[-1].info.experiment_id], f"tags.`gristmill.key` = '{key}'")
    assert [run.info.run_name for run in seen] == ["3-export", "2-pretrain", "1-corpus"]
    (source,) = json.loads(seen[-1].data.tags["gristmill.sources"])
    assert list(source["files"].values()) == [blake3(raw.read_bytes()).hexdigest()]
    assert source["uri"] == raw.as_uri()
    (dataset,) = [one.dataset for one in seen[-1].inputs.dataset_inputs]
    assert dataset.digest == source["digest"] == sources.digest(str(raw))


def test_every_stage_of_the_chain_is_told_without_the_artifacts(
    home: Path, uri: str, raw: Path, registered: Record
) -> None:
    found = lineage("clf@candidate", uri).to_json()
    assert (found["model"], found["version"], found["aliases"]) == ("clf", "1", ["candidate"])
    assert [stage["stage"] for stage in found["stages"]] == ["export", "pretrain", "corpus"]
    assert [s["key"] for s in found["stages"]] == [s.key for s in reversed(registered.stages)]
    export, pretrain, corpus = found["stages"]
    assert export["inputs"] == {"base": pretrain["output_digest"]}
    assert pretrain["inputs"] == {"corpus": corpus["output_digest"]}
    assert corpus["inputs"] == {"raw.txt": sources.digest(str(raw))}
    assert pretrain["config"] == {"steps": 40, "version": 1}
    assert corpus["config"]["min_chars"] == 1
    assert corpus["uri"].endswith(f"/store/corpus/{corpus['key']}")
    assert len({stage["run_id"] for stage in found["stages"]}) == 3
    assert {(stage["commit"], stage["dirty"]) for stage in found["stages"]} == {(registered.commit, registered.dirty)}
    assert found["corpus"]["digest"] == sources.digest(str(raw))
    assert found["labels"] is None


def test_the_chain_is_found_by_any_name_of_its_end(home: Path, uri: str, registered: Record) -> None:
    by_alias = lineage("clf@candidate", uri)
    for name in ("clf", "clf/1", "models:/clf/1", "models:/clf@candidate"):
        assert lineage(name, uri) == by_alias
    export, pretrain, _ = by_alias.stages
    for name in (registered.run, str(export.run_id)):
        assert lineage(name, uri).stages == by_alias.stages
    assert [stage.stage for stage in lineage(str(pretrain.run_id), uri).stages] == ["pretrain", "corpus"]
    parent = next(run for run in connect(uri).search_runs(["1"]) if run.info.run_name == registered.run)
    assert lineage(parent.info.run_id, uri).stages == by_alias.stages


def test_a_run_that_reused_everything_has_the_chain_of_those_that_made_it(home: Path, uri: str, run_toy: Run) -> None:
    first, second = (run_toy([Export(base=Pretrain(corpus=Corpus()))], plan=plan) for plan in ("one", "another"))
    sync(home, first.run, uri)
    sync(home, second.run, uri)
    assert lineage(second.run, uri).stages == lineage(first.run, uri).stages
    assert len(lineage(second.run, uri).stages) == 3


def test_a_stage_that_no_run_shows_any_more_is_told_by_who_used_it(
    home: Path, uri: str, registered: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    client = connect(uri)
    made = {run.info.run_name: run for run in client.search_runs(["1"])}
    client.delete_run(made["2-pretrain"].info.run_id)
    found = lineage("clf", uri)
    assert [(s.stage, s.run_id is None) for s in found.stages] == [("export", False), ("pretrain", True)]
    assert found.stages[1].key == registered.stage("pretrain").key
    print_lineage(found)
    assert "no run of this server shows it any more" in capsys.readouterr().out


def test_the_tree_leads_from_the_model_to_the_file(
    home: Path, uri: str, raw: Path, registered: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    print_lineage(lineage("clf", uri))
    title, *rows, source = capsys.readouterr().out.splitlines()
    assert title == "clf version 1 (candidate)"
    wanted = [("export", ""), ("pretrain", "base: "), ("corpus", "")]
    for depth, (row, (stage, called)) in enumerate(zip(rows, wanted, strict=True)):
        assert row.startswith(f"{'  ' * (depth + 1)}{called}{stage} {str(registered.stage(stage).key)[:12]}  content ")
    assert raw.as_uri() in source
    assert blake3(raw.read_bytes()).hexdigest() in source


@dataclass(frozen=True, kw_only=True)
class Start(Stage[Path]):
    """Begins with the files of a folder."""

    folder: str = knob()

    def sources(self) -> Mapping[str, str]:
        return sources.folder_digests(self.folder, ["*"])

    def run(self, ctx: Context) -> None:
        (ctx.out / "weights").write_text("of another")
        ctx.notes["model"] = {"role": "base"}
        ctx.notes["datasets"] = [sources.described(self.folder, "e" * 32, "init_from")]

    def load(self, path: Path) -> Path:
        return path


def test_a_model_that_began_with_a_registered_one_leads_to_the_corpus_of_that(
    home: Path, uri: str, raw: Path, registered: Record, run_toy: Run
) -> None:
    start = Start(folder=str(locate("clf", home, uri)))
    sync(home, run_toy([Export(base=start)], "another plan", "again").run, uri)
    found = lineage("again", uri)
    assert [stage.stage for stage in found.stages] == ["export", "start", "export", "pretrain", "corpus"]
    assert found.stages[1].needs[0].key == registered.stage("export").key
    assert found.stages[1].inputs[Path(start.folder).name] == "e" * 32
    assert found.to_json()["corpus"]["uri"] == raw.as_uri()
    maker = connect(uri).get_run(str(found.stages[1].run_id))
    assert len(maker.inputs.model_inputs) == 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nobody", "neither an export folder nor a registered model of .* Nearest: clf"),
        ("clf@champion", "has no alias 'champion'; it has: candidate"),
        ("clf/7", "has no version 7; it has: 1"),
        ("foreign", "was not registered by gristmill"),
    ],
)
def test_what_has_no_lineage_is_refused_in_words(home: Path, uri: str, registered: Record, name: str, why: str) -> None:
    del registered
    client = connect(uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", (home / "elsewhere").as_uri(), await_creation_for=0)
    with pytest.raises(UsageError, match=why):
        lineage(name, uri)


def test_a_run_that_is_none_of_a_pipeline_is_refused_in_words(home: Path, uri: str, registered: Record) -> None:
    del registered
    search = connect(uri).create_run("1", tags={"gristmill.stage": "tune"})
    with pytest.raises(UsageError, match=f"{search.info.run_id} is no run of a pipeline or stage"):
        lineage(search.info.run_id, uri)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab._", max_size=3), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["lr", "split", "steps"]), VALUES), VALUES)
def test_settings_come_back_from_params_as_they_were(config: dict[str, Any], seed: Any) -> None:
    recipe = {"stage": "labels", "version": 2, "sources": {"a": "b"}, "inputs": {}, "config": config, "seed": seed}
    assert config_of("labels", params_of("labels", recipe)) == {"version": 2, **config, "seed": seed}


@pytest.mark.parametrize("count", [0, 1, 103])
def test_the_inputs_of_a_stage_fit_into_tags_and_come_back(count: int) -> None:
    inputs = {f"repeats.{n}": {"kind": "finetune", "key": f"{n:032}", "digest": "d" * 32} for n in range(count)}
    tags = inputs_tags(inputs)
    assert max(map(len, tags.values())) <= LONGEST_TAG
    assert inputs_of({"gristmill.key": "another", **tags}) == inputs


def test_every_stage_of_the_quickstart_gives_its_settings_back() -> None:
    graph = assemble(load(PipelineConfig, Path("configs/quickstart.yaml"), ["evaluate.random_init=true"]).config)
    for stage in topological(graph.targets):
        recipe = stage.recipe(dict.fromkeys(stage.inputs, "0" * 32))
        own = {name: recipe[name] for name in recipe if name not in ("stage", "sources", "inputs", "config")}
        assert config_of(stage.kind, params_of(stage.kind, recipe)) == {**recipe.get("config", {}), **own}, stage.name


def test_more_files_than_a_tag_holds_are_counted() -> None:
    dataset = {"name": "folder", "source": "/data/folder", "digest": "d" * 32, "context": "corpus"}
    text = sources_text([dataset], {f"{i:06d} .txt": "f" * 64 for i in range(1000)})
    assert json.loads(text) == [{"name": "folder", "uri": "file:///data/folder", "digest": "d" * 32, "n_files": 1000}]


RAW_FILES = (("corpus", "txt"), ("labels", "jsonl"))


@pytest.mark.slow
def test_the_product_tells_its_lineage_as_the_store_has_it_and_a_refused_promotion_fails_no_run(tmp_path: Path) -> None:
    quick = ["pretrain.steps=5", "finetune.epochs=1", "evaluate.random_init=false"]
    result = run(tmp_path / "home", *quick, "register.promote=true")
    (promotion,) = result["promotions"]
    assert (result["status"], promotion["promoted"], promotion["version"]) == ("succeeded", False, "1")
    assert "is not above the 1.000 of the best baseline, tfidf-logreg" in promotion["summary"]
    other = gristmill(tmp_path / "bare", "lineage", "smoke", "--json", MLFLOW_TRACKING_URI=result["tracking_uri"])
    found = answer(other)
    assert not (tmp_path / "bare" / "store").exists()
    assert {stage["stage"]: stage["key"] for stage in found["stages"]} == keys(result)
    store = Store(tmp_path / "home")
    for stage in found["stages"]:
        manifest = store.find(stage["stage"].split("-")[0], stage["key"])
        assert manifest is not None
        assert stage["output_digest"] == manifest.digest
        read = {f"{name}.{suffix}": sources.digest(f"data/smoke/{name}.{suffix}") for name, suffix in RAW_FILES}
        used = {name: needed["digest"] for name, needed in manifest.meta["input_keys"].items()}
        assert stage["inputs"].items() <= (used or read).items()
        assert len(stage["inputs"]) == len(used or [1])
        assert manifest.meta["recipe"].get("config", {}).items() <= stage["config"].items()
        assert stage["run_id"]
    tags = connect(result["tracking_uri"]).get_model_version("smoke", "1").tags
    assert "gristmill.finetune.key" in tags
    assert not any("baseline" in name for name in tags), "what it was compared with is none of its ancestors"
    assert found["stages"][-1]["stage"] == "corpus"
    assert found["corpus"]["digest"] == sources.digest("data/smoke/corpus.txt")
    assert found["labels"]["digest"] == sources.digest("data/smoke/labels.jsonl")
    assert list(found["corpus"]["files"].values()) == [blake3(Path("data/smoke/corpus.txt").read_bytes()).hexdigest()]
