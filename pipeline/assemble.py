"""Where everything is wired: one config in, the graph of stages out. Read this to learn what a pipeline is."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from annotated_types import MinLen

from model.config import ModelConfig
from model.objectives import pretraining
from pipeline.bpe import TokenizerConfig
from pipeline.config import laid_over
from pipeline.identity import knob
from pipeline.sections import ClusterConfig, ModelSection, RegisterConfig, TrackingConfig
from pipeline.stage import Stage
from pipeline.stages.corpus import CorpusConfig, CorpusStage
from pipeline.stages.evaluate import Evaluate, EvaluateConfig
from pipeline.stages.export import Export, ExportConfig
from pipeline.stages.finetune import Finetune, FinetuneConfig
from pipeline.stages.imported import ImportModel, ImportTokenizer, model_config
from pipeline.stages.labels import LabelsConfig, LabelsStage
from pipeline.stages.ngrams import NGramsConfig, NGramsStage
from pipeline.stages.pretrain import Pretrain, PretrainConfig
from pipeline.stages.shards import ShardsConfig, ShardsStage
from pipeline.stages.task_text import TaskText
from pipeline.stages.tokenizer import TokenizerStage
from pipeline.training import TrainingConfig

TASK_NAME = re.compile("[a-z0-9][a-z0-9_-]*")


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

    name: Annotated[str, MinLen(1)]
    """Name of the pipeline: the MLflow experiment, and the registered model unless `register.name` says otherwise."""
    seed: int = 0
    """Seed of everything random: data order, initial weights, dropout, splits, bootstrap."""
    init_from: str | None = None
    """Folder of a Llama model as transformers saves it, or a registered model (models:/NAME@ALIAS), to start from.

    It brings its tokenizer and its sizes; rows are no longer than it was made for, and pretraining may be left out."""
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
        if self.init_from is not None and (given := self.model.sizes_given):
            raise ValueError(f"init_from brings the sizes of the model: leave out {', '.join(given)} of `model`")
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
    """A task with its sections laid over the pipeline's; what is no section is left to be refused where it stands."""
    if not isinstance(task, dict):
        return task
    shared = {name: section for name in ("adapt", "finetune", "ngrams") if isinstance(section := tree.get(name), dict)}
    return {**task, **{name: laid_over(section, task.get(name, {})) for name, section in shared.items()}}


Base = Pretrain | ImportModel
"""What makes a language model, and says with what shape and tokenizer."""
Classifier = Finetune | NGramsStage
"""What makes a classifier: a network, or one that reads n-grams besides."""


@dataclass(frozen=True)
class Branch:
    """The stages of one task, by role; `adapted` is the base where it is not trained further, and the classifier of a
    network is that network where it reads no n-grams.
    """

    labels: LabelsStage
    adapted: Base
    finetune: Finetune
    classifier: Classifier
    rivals: tuple[Classifier, ...]
    """The same from other seeds, and from random weights, each network before its classifier."""
    evaluate: Evaluate
    export: Export | None

    @property
    def stages(self) -> list[Stage[Any]]:
        made = (self.labels, self.adapted, self.finetune, self.classifier, *self.rivals, self.evaluate, self.export)
        return [stage for n, stage in enumerate(made) if stage is not None and stage not in made[:n]]


@dataclass(frozen=True)
class Graph:
    """The stages of one pipeline: those that lead to the base model, and a branch for each task by its name."""

    trunk: list[Stage[Any]]
    branches: Mapping[str, Branch]

    @property
    def targets(self) -> list[Stage[Any]]:
        """What a run makes: every stage, in the order of the pipeline."""
        branches = [stage for branch in self.branches.values() for stage in branch.stages]
        return [*self.trunk, *(stage for stage in branches if stage not in self.trunk)]

    @property
    def exports(self) -> list[Export]:
        return [branch.export for branch in self.branches.values() if branch.export]


def assemble(config: PipelineConfig) -> Graph:
    """Wire the stages of a pipeline."""
    corpus = CorpusStage(config=config.corpus) if config.corpus else None
    if config.init_from:
        tokenizer = ImportTokenizer(folder=config.init_from)
        base = ImportModel(folder=config.init_from, model=shape(config, "next_token"), tokenizer=tokenizer)
    else:
        assert corpus is not None, "without a model to start from there is a corpus"
        tokenizer, base = TokenizerStage(config=config.tokenizer, corpus=corpus), None
    trunk = [corpus, tokenizer, base]
    if corpus and config.pretrain:
        shards = ShardsStage(config=config.shards, corpus=corpus, tokenizer=tokenizer)
        base = pretrain(config, config.pretrain, shards, base)
        trunk += [shards, base]
        if config.midtrain:
            base = pretrain(config, config.midtrain, shards, base, "midtrain")
            trunk.append(base)
    assert base is not None, "there is a model to start from, or pretraining"
    learned = corpus if config.pretrain else None
    branches = {name: branch(config, name, task, base, learned) for name, task in config.all_tasks.items()}
    return Graph([stage for stage in trunk if stage is not None], branches)


def pretrain(
    config: PipelineConfig, training: PretrainConfig, shards: ShardsStage, base: Base | None, label: str = ""
) -> Pretrain:
    """Wire training on shards, on top of `base` if there is one."""
    return Pretrain(
        config=training.resolve(),
        model=shape(config, training.objective),
        shards=shards,
        tokenizer=shards.tokenizer,
        base=base,
        seed=config.seed,
        label=label,
    )


def shape(config: PipelineConfig, objective: str) -> ModelConfig:
    """The model that an objective wants: whether it reads both ways, and the tokens it needs past the vocabulary."""
    wanted = pretraining(objective)
    if config.init_from is None:
        return config.model.resolve(config.tokenizer.vocab_size + wanted.EXTRA_TOKENS, causal=wanted.CAUSAL)
    start = model_config(config.init_from)
    return replace(
        start,
        vocab_size=start.vocab_size + wanted.EXTRA_TOKENS,
        causal=wanted.CAUSAL,
        seq_len=min(start.seq_len, config.model.seq_len),
        dropout=config.model.dropout,
        sliding_window=config.model.sliding_window,
        attention=config.model.attention,
    )


def branch(config: PipelineConfig, name: str, task: TaskConfig, base: Base, corpus: CorpusStage | None) -> Branch:
    """Wire the stages of one task onto the base, which has been trained on the corpus."""
    labels = LabelsStage(config=task.labels, seed=config.seed, label=name)
    adapted = adapt(config, name, task.adapt, labels, base) if task.adapt else base
    network = Finetune(
        config=task.finetune.resolve(),
        base=adapted,
        model=adapted.model,
        tokenizer=base.tokenizer,
        labels=labels,
        seed=config.seed,
        label=name,
    )
    repeats = [
        replace(network, seed=config.seed + n, label=joined(name, f"seed-{n}")) for n in range(1, config.evaluate.seeds)
    ]
    from_random = replace(network, base=None, label=joined(name, "random-init"))
    networks = [network, *repeats, *([from_random] if config.evaluate.random_init else [])]
    classifiers = [reading_ngrams(task, each) for each in networks]
    classifier = classifiers[0]
    scores = Evaluate(
        config=config.evaluate,
        classifier=classifier,
        labels=labels,
        corpus=corpus if config.evaluate.contamination else None,
        random_init=classifiers[-1] if config.evaluate.random_init else None,
        repeats=tuple(classifiers[1 : config.evaluate.seeds]),
        seed=config.seed,
        label=name,
    )
    export = config.export and Export(
        config=config.export, classifier=classifier, labels=labels, evaluation=scores, label=name
    )
    rivals = tuple(stage for pair in zip(networks[1:], classifiers[1:], strict=True) for stage in pair)
    return Branch(labels, adapted, network, classifier, rivals, scores, export)


def reading_ngrams(task: TaskConfig, network: Finetune) -> Classifier:
    """Wire n-grams beside a network, if the task wants them."""
    if task.ngrams is None:
        return network
    return NGramsStage(config=task.ngrams, classifier=network, labels=network.labels, label=network.label)


def adapt(config: PipelineConfig, name: str, training: PretrainConfig, labels: LabelsStage, base: Base) -> Pretrain:
    """Wire pretraining that goes on from the base with the training texts of a task."""
    text, label = TaskText(labels=labels, label=name), joined(name, "adapt")
    shards = ShardsStage(config=config.shards, corpus=text, tokenizer=base.tokenizer, label=label)
    return pretrain(config, training, shards, base, label)


def joined(*names: str) -> str:
    return "-".join(name for name in names if name)
