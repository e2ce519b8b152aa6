"""What a config becomes: the graph of stages, and a branch for each task."""

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from pipeline.assemble import Graph, assemble
from pipeline.config import load
from pipeline.errors import UsageError
from pipeline.pipeline_config import PipelineConfig
from pipeline.runner import topological
from pipeline.stages.blend import BlendStage
from pipeline.stages.ngrams import NGramsConfig, NGramsStage
from pipeline.stages.pretrain import Pretrain
from pipeline.windows import Windows

TWO_TASKS = """
extends: SMOKE
labels: null
adapt: {steps: 5, lr: 1.0e-3}
finetune: {epochs: 7}
tasks:
  plain:
    labels: {path: data/smoke/labels.jsonl}
  other:
    labels: {path: data/smoke/labels.jsonl, split: [0.6, 0.2, 0.2]}
    adapt: {objective: masked}
    finetune: {pooling: mean}
"""


def configured(tmp_path: Path, text: str, *overrides: str) -> PipelineConfig:
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("SMOKE", str(Path("configs/smoke.yaml").absolute())))
    return load(PipelineConfig, path, overrides).config


def graph(tmp_path: Path, text: str, *overrides: str) -> Graph:
    return assemble(configured(tmp_path, text, *overrides))


def test_each_task_is_a_branch_on_the_same_base(tmp_path: Path):
    made = graph(tmp_path, TWO_TASKS)
    assert list(made.branches) == ["plain", "other"]
    for name, branch in made.branches.items():
        assert branch.adapted.base == made.trunk[-1]
        assert branch.finetune.base == branch.adapted
        assert branch.evaluate.name == f"evaluate-{name}"
    names = [stage.name for stage in made.targets]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("text", [TWO_TASKS, "extends: SMOKE\nadapt: {steps: 3}"])
def test_a_stage_says_where_in_the_config_its_settings_stand(tmp_path: Path, text: str):
    config = configured(tmp_path, text, "midtrain.steps=2", "ngrams.order=2", "evaluate.random_init=true")
    for stage in topological(assemble(config).targets):
        if hasattr(stage, "config"):
            settings = reduce(within, (stage.section or stage.kind).split("."), config)
            assert getattr(settings, "resolve", lambda s=settings: s)() == stage.config, stage.name


def within(settings: Any, name: str) -> Any:
    return settings[name] if isinstance(settings, Mapping) else getattr(settings, name)


def test_a_task_says_only_what_is_its_own(tmp_path: Path):
    plain, other = graph(tmp_path, TWO_TASKS).branches.values()
    assert (plain.finetune.config.epochs, plain.finetune.config.pooling) == (7, "last")
    assert (other.finetune.config.epochs, other.finetune.config.pooling) == (7, "mean")
    assert other.finetune.config.lr == 5e-3  # of the file that this one extends
    assert (other.adapted.config.steps, other.adapted.config.objective) == (5, "masked")


def test_a_task_goes_without_a_section_of_the_pipeline_by_null(tmp_path: Path):
    made = graph(tmp_path, TWO_TASKS, "ngrams={}", "tasks.plain.adapt=null", "tasks.plain.ngrams=null")
    plain, other = made.branches.values()
    assert plain.adapted == made.trunk[-1]
    assert plain.classifier == plain.finetune
    assert (other.adapted.base, other.classifier) == (
        made.trunk[-1],
        replace(other.classifier, network=other.finetune),
    )


def test_seeds_are_the_same_fine_tuning_from_other_draws(tmp_path: Path):
    for name, branch in graph(tmp_path, TWO_TASKS, "evaluate.seeds=3", "seed=5").branches.items():
        assert [repeat.seed for repeat in branch.evaluate.repeats] == [6, 7]
        assert [repeat.name for repeat in branch.evaluate.repeats] == [f"finetune-{name}-seed-{n}" for n in (1, 2)]
        for repeat in branch.evaluate.repeats:
            assert replace(repeat, seed=5, label=name) == branch.finetune
            assert repeat in branch.stages
            assert repeat in branch.evaluate.inputs.values()


def test_rivals_learn_from_the_labels_of_their_task_alone(tmp_path: Path):
    made = graph(tmp_path, TWO_TASKS, "evaluate.baselines=[linear-svm]")
    for name, branch in made.branches.items():
        [rival] = branch.evaluate.baselines
        assert (rival.name, rival.rival) == (f"baseline-{name}-linear-svm", "linear-svm")
        assert list(rival.inputs.values()) == [branch.labels]
        assert rival in made.targets


def test_a_masked_objective_reads_both_ways_and_has_a_token_more(tmp_path: Path):
    plain, other = graph(tmp_path, TWO_TASKS).branches.values()
    assert (plain.finetune.model.causal, plain.finetune.model.vocab_size) == (True, 512)
    assert (other.finetune.model.causal, other.finetune.model.vocab_size) == (False, 513)


def test_a_second_phase_of_pretraining_goes_on_from_the_first_on_the_same_shards(tmp_path: Path):
    text = "extends: SMOKE\nmidtrain: {objective: masked_next_token, steps: 2}\nadapt: {steps: 2}"
    made = graph(tmp_path, text)
    first, second = made.trunk[-2:]
    assert isinstance(first, Pretrain)
    assert isinstance(second, Pretrain)
    assert second.base == first
    assert second.shards == first.shards
    assert (first.model.causal, second.model.causal) == (True, False)
    assert made.branches[""].adapted.base == second
    assert second.name == "pretrain-midtrain"


def test_a_second_phase_needs_a_first(tmp_path: Path):
    with pytest.raises(UsageError, match="midtrain goes on after pretrain"):
        graph(tmp_path, "name: a\ninit_from: models:/base\nmidtrain: {steps: 2}")


def test_the_only_task_and_one_of_several_are_the_same_artifact(tmp_path: Path):
    alone = graph(tmp_path, "extends: SMOKE").branches[""].finetune
    one = (
        graph(
            tmp_path,
            "extends: SMOKE\nlabels: null\ntasks: {a: {labels: {path: data/smoke/labels.jsonl, "
            "split: [0.7, 0.1, 0.2]}}}",
        )
        .branches["a"]
        .finetune
    )
    assert one.key({}) == alone.key({})
    assert one != replace(one, label="")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("extends: SMOKE\ntasks: {a: {labels: {path: x}}}", "labels for one task, or tasks for several"),
        ("extends: SMOKE\nlabels: null\ntasks: {A b: {labels: {path: x}}}", "tasks.A b: a task is named by"),
        (
            "extends: SMOKE\nlabels: null\ntasks: {a: {labels: {path: x}, finetune: {epoch: 1}}}",
            r"config.yaml:3:43  tasks.a.finetune.epoch: unknown key. Did you mean `epochs`\?",
        ),
        ("extends: SMOKE\nlabels: null\ntasks: {a: 3}", "tasks.a"),
        (
            "extends: SMOKE\nlabels: null\ntasks: {a: {labels: {path: x}, finetune: 3}}",
            "config.yaml:3:32  tasks.a.finetune=3: must be",
        ),
    ],
)
def test_a_wrong_task_is_named_where_it_stands(tmp_path: Path, text: str, told: str):
    with pytest.raises(UsageError, match=told):
        graph(tmp_path, text)


def test_ngrams_stand_beside_every_network_of_a_task_that_wants_them(tmp_path: Path):
    windows = ("tasks.other.finetune.windows=3", "tasks.other.finetune.window_overlap=4")
    rivals = ("evaluate.seeds=2", "evaluate.random_init=true")
    made = graph(tmp_path, TWO_TASKS, "tasks.other.ngrams.order=2", *windows, *rivals)
    plain, other = made.branches["plain"], made.branches["other"]
    assert plain.classifier == plain.finetune
    assert plain.evaluate.classifier == plain.finetune
    ngrams = NGramsStage(
        config=NGramsConfig(order=2),
        tokenizer=other.finetune.tokenizer,
        labels=other.labels,
        seq_len=32,
        reading=Windows(3, 4),
        label="other",
        section="tasks.other.ngrams",
    )
    assert other.classifier == BlendStage(network=other.finetune, ngrams=ngrams, labels=other.labels, label="other")
    assert other.export
    assert other.export.classifier == other.evaluate.classifier == other.classifier
    names = ["ngrams-other", "finetune-other", "blend-other", "finetune-other-seed-1", "blend-other-seed-1"]
    names += ["finetune-other-random-init", "blend-other-random-init"]
    assert [stage.name for stage in other.stages if stage.kind in ("finetune", "ngrams", "blend")] == names
    beside = [stage for stage in (*other.evaluate.repeats, other.evaluate.random_init) if isinstance(stage, BlendStage)]
    assert [stage.name for stage in beside] == ["blend-other-seed-1", "blend-other-random-init"]
    assert all(stage.ngrams == ngrams for stage in beside), "learned once for all"
    shared = graph(tmp_path, TWO_TASKS + "ngrams: {order: 1}", "tasks.other.ngrams.buckets=9")
    assert [stage.config for stage in shared.targets if stage.kind == "ngrams"] == [
        NGramsConfig(order=1),
        NGramsConfig(order=1, buckets=9),
    ]
