from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Le
from hypothesis import given, settings
from hypothesis import strategies as st

from model import variants
from model.objectives import Pretraining
from pipeline import engine
from pipeline.assemble import assemble
from pipeline.config import laid_over, load, properties, schema
from pipeline.errors import UsageError
from pipeline.pipeline_config import PipelineConfig
from pipeline.sections import ModelSection


@dataclass(frozen=True, kw_only=True)
class Train:
    lr: Annotated[float, Ge(0), Le(1)] = 3e-4
    """Peak learning rate."""
    steps: int
    mode: Literal["fast", "slow"] = "fast"
    split: str | tuple[float, float] = (0.9, 0.1)

    def __post_init__(self) -> None:
        if self.steps == 13:
            raise ValueError("steps=13 is unlucky; take 12")


@dataclass(frozen=True, kw_only=True)
class Toy:
    name: str
    train: Train
    labels: tuple[str, ...] = ()
    more: Train | None = None
    extra: dict[str, int] = field(default_factory=dict)


TOY = """\
name: toy
train:
  steps: 20
  lr: 3e-3
"""


def read(tmp_path: Path, text: str, *overrides: str) -> Toy:
    path = tmp_path / "toy.yaml"
    path.write_text(text)
    return load(Toy, path, overrides).config


def test_numbers_booleans_and_words_are_read_as_yaml_1_2(tmp_path: Path):
    config = read(tmp_path, TOY + "labels: [yes, no, on, 1e3]\n".replace("1e3", "'1e3'"))
    assert config.train.lr == 3e-3
    assert config.labels == ("yes", "no", "on", "1e3")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "steps: 20",
            "stpes: 20",
            r"toy\.yaml:3:3  train\.stpes: unknown key\. Did you mean `steps`\?\n    3 \|   stpes",
        ),
        ("steps: 20", "steps: many", r"toy\.yaml:3:3  train\.steps='many': must be a valid integer"),
        ("lr: 3e-3", "lr: 5", r"toy\.yaml:4:3  train\.lr=5: must be less than or equal to 1"),
        ("  steps: 20\n", "", r"toy\.yaml:2:1  train\.steps: required, and not given"),
        ("lr: 3e-3", "mode: quick", r"toy\.yaml:4:3  train\.mode='quick': must be 'fast' or 'slow'"),
        ("steps: 20", "steps: 13", r"toy\.yaml:2:1  train: steps=13 is unlucky; take 12"),
        ("lr: 3e-3", "lr: 3e-3\n  lr: 2", r"toy\.yaml:5:3  not YAML: found duplicate key"),
        ("name: toy", "name: 2024-13-45", r"toy\.yaml  not YAML: month must be in 1\.\.12"),
        ("steps: 20", "steps: true", r"toy\.yaml:3:3  train\.steps=True: must be a number\n    3 \|   steps: true"),
        ("train:", "train: [", r"toy\.yaml:\d+:\d+  not YAML"),
        ("name: toy", "name: !!python/object:os.system x", r"tags such as .* are refused"),
        ("lr: 3e-3", "split: [1, two]", r"toy\.yaml:4:3  train\.split"),
        ("name: toy", "nmae: toy", r"nmae: unknown key\. Did you mean `name`\?"),
    ],
)
def test_a_wrong_config_says_where_what_and_why(tmp_path: Path, old: str, new: str, message: str):
    with pytest.raises(UsageError, match=message):
        read(tmp_path, TOY.replace(old, new))


def test_every_problem_is_listed_at_once(tmp_path: Path):
    with pytest.raises(UsageError) as error:
        read(tmp_path, "name: toy\ntrain:\n  stpes: 1\n  lr: 7\n")
    assert len([line for line in str(error.value).splitlines() if "toy.yaml:" in line]) == 3


def test_set_replaces_and_is_named_in_errors(tmp_path: Path):
    assert read(tmp_path, TOY, "train.lr=1e-2", "labels=[a, b]").train.lr == 1e-2
    with pytest.raises(UsageError, match=r"--set #2  train\.lr=5: must be less"):
        read(tmp_path, TOY, "train.steps=3", "train.lr=5")
    with pytest.raises(UsageError, match="write it as --set"):
        read(tmp_path, TOY, "train.lr")


def test_a_file_extends_another_and_wins(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(TOY)
    config = read(tmp_path, "extends: base.yaml\ntrain:\n  steps: 5\n")
    assert (config.name, config.train.steps, config.train.lr) == ("toy", 5, 3e-3)
    (tmp_path / "base.yaml").write_text(TOY.replace("3e-3", "9"))
    with pytest.raises(UsageError, match=r"base\.yaml:4:3"):
        read(tmp_path, "extends: base.yaml\n")


def test_files_that_extend_each_other_are_refused(tmp_path: Path):
    for wrong in ("", "5", "[5]", "{a: b}"):
        with pytest.raises(UsageError, match=r"toy\.yaml:1:1  extends: must be the name of a file"):
            read(tmp_path, f"extends: {wrong}\n")
    (tmp_path / "a.yaml").write_text("extends: toy.yaml\n")
    with pytest.raises(UsageError, match="extends itself"):
        read(tmp_path, "extends: a.yaml\n")


def test_an_alias_bomb_is_refused_in_no_time(tmp_path: Path):
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12))
    with pytest.raises(UsageError, match="alias"):
        read(tmp_path, bomb)


def test_a_section_may_repeat_another(tmp_path: Path):
    path = tmp_path / "merged.yaml"
    smoke = Path("configs/smoke.yaml").absolute()
    path.write_text(f"extends: {smoke}\npretrain: &p {{lr: 0.007, steps: 30, tokens: null}}\nmidtrain:\n  <<: *p\n")
    config = load(PipelineConfig, path).config
    assert config.midtrain is not None
    assert config.midtrain.lr == 0.007


def test_a_missing_file_is_named_with_the_place_looked_at(tmp_path: Path):
    with pytest.raises(UsageError, match=str(tmp_path)):
        load(Toy, tmp_path / "none.yaml")


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_is_a_config_or_a_clear_refusal(tmp_path_factory: pytest.TempPathFactory, text: str):
    path = tmp_path_factory.mktemp("fuzz") / "toy.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError):
        load(Toy, path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed=-1: must be greater than or equal to 0"),
        ("seed=9223372036854775807", "seed=9223372036854775807: must be less than or equal to"),
        ("corpus.path=''", "corpus.path='': must have at least 1 character"),
        ("finetune.epochs=true", "finetune.epochs=True: must be a number"),
        ("finetune={lr: true}", "finetune.lr=True: must be a number"),
        ("model.rope_theta=.inf", "model.rope_theta=inf: must be a finite number"),
        ("finetune.weight_decay=.nan", "finetune.weight_decay=nan: must be a finite number"),
        ("name=2024-13-45", "name: '2024-13-45' is not a YAML value: month must be in 1..12"),
        ("tasks=&a {b: *a}", "tasks: '&a {b: *a}' is not a YAML value"),
        ("name=" + "[" * 2000, "name: '[[["),
        ("extends=other.yaml", "extends: a file alone can extend another"),
        ("name=news/v2", "name='news/v2': must match pattern"),
        ("register.name=a:b", "register.name='a:b': must match pattern"),
        ("labels.split=[0.8, 0.2]", "labels.split=[0.8, 0.2]: has none of the forms that this key takes. The column"),
        ("cluster.workers=[1, 2, 3]", "cluster.workers=[1, 2, 3]: has none of the forms that this key takes. Training"),
    ],
)
def test_a_value_that_no_run_could_use_is_refused_before_it(override: str, message: str):
    with pytest.raises(UsageError) as error:
        load(PipelineConfig, Path("configs/smoke.yaml"), [override])
    assert str(error.value).startswith(f"--set #1  {message}")
    assert str(error.value).count("--set #1") == 1


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_assembles(path: Path):
    assert assemble(load(PipelineConfig, path).config).targets


def test_the_committed_schema_is_the_code_s():
    import json

    assert json.loads(Path("configs/schema.json").read_text()) == schema(PipelineConfig)


def test_a_config_offers_the_engines_and_objectives_that_there_are():
    offered = properties(schema(PipelineConfig), ("pretrain",))
    assert set(offered["engine"]["enum"]) == {"auto", *engine.names()}
    modules = {name: variants.load("model.objectives", name) for name in variants.names("model.objectives")}
    pretraining = {name for name, module in modules.items() if isinstance(module, Pretraining)}
    assert set(offered["objective"]["enum"]) == pretraining


def test_sections_are_laid_over_each_other_key_by_key():
    assert laid_over({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"c": 4}, "e": {"f": 5}}) == {
        "a": {"b": 1, "c": 4},
        "d": 3,
        "e": {"f": 5},
    }


def test_one_dial_sizes_the_model_and_given_fields_win():
    model = ModelSection(depth=12).resolve(vocab_size=100)
    assert (model.d_model, model.n_layers, model.n_heads, model.n_kv_heads, model.d_ff) == (768, 12, 12, 12, 2048)
    assert ModelSection(depth=12, n_layers=3, n_kv_heads=4).resolve(100).n_layers == 3
