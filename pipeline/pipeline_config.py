"""What a config file may say: every section, and what the sections ask of each other."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Le, MinLen

from pipeline.bpe import TokenizerConfig
from pipeline.config import laid_over
from pipeline.identity import knob
from pipeline.sections import ClusterConfig, ModelSection, Name, RegisterConfig, TrackingConfig
from pipeline.stages.corpus import CorpusConfig
from pipeline.stages.evaluate import EvaluateConfig
from pipeline.stages.export import ExportConfig
from pipeline.stages.finetune import FinetuneConfig
from pipeline.stages.labels import LabelsConfig
from pipeline.stages.ngrams import NGramsConfig
from pipeline.stages.pretrain import PretrainConfig
from pipeline.stages.shards import ShardsConfig
from pipeline.training import TrainingConfig

TASK_NAME = re.compile("[a-z0-9][a-z0-9_-]*")
SHARED = ("adapt", "finetune", "ngrams")
"""The sections of a task that are laid over the pipeline's."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One of several labelled tasks on the same base. What a section here does not say, the pipeline's own says."""

    labels: LabelsConfig
    """Where its labelled text is."""
    adapt: PretrainConfig | None = None
    """Laid over the pipeline's `adapt`."""
    finetune: FinetuneConfig = FinetuneConfig()
    """Laid over the pipeline's `finetune`."""
    ngrams: NGramsConfig | None = None
    """Laid over the pipeline's `ngrams`."""
    register: RegisterConfig = knob(default_factory=RegisterConfig)
    """Default name: the pipeline's and the task's, with a dash between them."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """One config file: raw text in, a registered classifier out."""

    name: Name
    """Name of the pipeline: the MLflow experiment, and the registered model unless `register.name` says otherwise."""
    seed: Annotated[int, Ge(0), Le(2**62)] = 0
    """Seed of everything random but the splits of labelled texts: data order, initial weights, dropout, bootstrap."""
    init_from: Annotated[str, MinLen(1)] | None = None
    """What to start from: a folder with a Llama model as transformers saves it, or with a model of our own, such as an
    ONNX export; or a registered model (models:/NAME@ALIAS).

    It brings its tokenizer, its sizes and whether it reads both ways; rows are no longer than it was made for, and
    pretraining, which goes by its own objective, may be left out."""
    corpus: CorpusConfig | None = None
    """The text to pretrain on."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    shards: ShardsConfig = ShardsConfig()
    model: ModelSection = ModelSection()
    pretrain: PretrainConfig | None = None
    """How to pretrain on the corpus."""
    midtrain: PretrainConfig | None = None
    """Go on pretraining on the same corpus with another objective: first next tokens, say, then hidden ones
    (arXiv:2507.00994)."""
    labels: LabelsConfig | None = None
    """The labelled text of the only task; none ends the pipeline with the base model."""
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    """Several labelled tasks by name, in place of `labels`: each becomes a classifier on the same base."""
    adapt: PretrainConfig | None = None
    """Go on pretraining on the training texts of the task before it is fine-tuned (arXiv:2004.10964)."""
    finetune: FinetuneConfig = FinetuneConfig()
    ngrams: NGramsConfig | None = None
    """Add a linear model of the texts' n-grams to the fine-tuned network. It has no stock Llama export."""
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig | None = ExportConfig()
    """null makes and registers none."""
    cluster: ClusterConfig = knob(default_factory=ClusterConfig)
    tracking: TrackingConfig = knob(default_factory=TrackingConfig)
    register: RegisterConfig = knob(default_factory=RegisterConfig)

    def __post_init__(self) -> None:
        sections = {"corpus": self.corpus, "pretrain": self.pretrain}
        missing = [name for name, section in sections.items() if section is None]
        if len(missing) == 1 or (missing and self.init_from is None):
            raise ValueError(
                f"{' and '.join(missing)}: required, and not given; both may be left out where init_from names a model"
            )
        if self.init_from is not None and (given := self.model.fixed_by_weights):
            raise ValueError(f"init_from brings the shape of the model: leave out {', '.join(given)} of `model`")
        if self.labels is not None and self.tasks:
            raise ValueError("give labels for one task, or tasks for several, not both")
        if self.midtrain is not None and self.pretrain is None:
            raise ValueError("midtrain goes on after pretrain, and there is none")
        for name in self.tasks:
            if not TASK_NAME.fullmatch(name):
                raise ValueError(f"tasks.{name}: a task is named by lower-case letters, digits, - and _")
        self._check_engines()

    def _check_engines(self) -> None:
        for section, settings in self._trainings():
            if self.cluster.workers != 1 and settings.engine == "plain":
                raise ValueError(
                    f"cluster.workers={self.cluster.workers} needs {section}.engine auto or deepspeed, not plain"
                )

    @staticmethod
    def complete(tree: Mapping[str, Any]) -> dict[str, Any]:
        """Lay the sections of each task over those of the pipeline, in what a config file says."""
        if not isinstance(tasks := tree.get("tasks"), dict):
            return dict(tree)
        return {**tree, "tasks": {name: _over_own_sections(tree, task) for name, task in tasks.items()}}

    def _trainings(self) -> Iterator[tuple[str, TrainingConfig]]:
        sections = {name: getattr(self, name) for name in ("pretrain", "midtrain", "adapt", "finetune")}
        for name, task in self.tasks.items():
            sections |= {f"tasks.{name}.adapt": task.adapt, f"tasks.{name}.finetune": task.finetune}
        yield from ((name, section) for name, section in sections.items() if section is not None)

    @property
    def all_tasks(self) -> dict[str, TaskConfig]:
        """Every task by its name; the only task of a pipeline has the name ""."""
        if self.labels is None:
            return dict(self.tasks)
        only = TaskConfig(
            labels=self.labels,
            adapt=self.adapt,
            finetune=self.finetune,
            ngrams=self.ngrams,
            register=self.register,
        )
        return {"": only}


def _over_own_sections(tree: Mapping[str, Any], task: Any) -> Any:
    """A task with its sections laid over the pipeline's; what is no section, as null, stands as it is."""
    if not isinstance(task, dict):
        return task
    shared = {name: tree[name] for name in SHARED if isinstance(tree.get(name), dict)}
    own = {name: over for name in shared if isinstance(over := task.get(name, {}), dict)}
    return {**task, **{name: laid_over(shared[name], over) for name, over in own.items()}}
