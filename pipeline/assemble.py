"""Where everything is wired: one config in, the graph of stages out. Read this to learn what a pipeline is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.config import ModelConfig
from model.objectives import pretraining
from pipeline.pipeline_config import PipelineConfig, TaskConfig
from pipeline.stage import Stage
from pipeline.stages.baseline import Baseline
from pipeline.stages.blend import BlendStage
from pipeline.stages.corpus import CorpusStage
from pipeline.stages.evaluate import Evaluate
from pipeline.stages.export import Export
from pipeline.stages.finetune import Finetune
from pipeline.stages.imported import ImportModel, ImportTokenizer, model_config
from pipeline.stages.labels import LabelsStage
from pipeline.stages.ngrams import NGramsStage
from pipeline.stages.pretrain import Pretrain, PretrainConfig
from pipeline.stages.shards import ShardsStage
from pipeline.stages.task_text import TaskText
from pipeline.stages.tokenizer import TokenizerStage

Base = Pretrain | ImportModel
"""What makes a language model, and says with what shape and tokenizer."""
Classifier = Finetune | BlendStage
"""What makes a classifier: a network, or one that reads n-grams besides."""


@dataclass(frozen=True)
class Branch:
    """The stages of one task, by role; `adapted` is the base where it is not trained further."""

    labels: LabelsStage
    adapted: Base
    classifier: Classifier
    rivals: tuple[Classifier, ...]
    """The same from other seeds, and from random weights."""
    evaluate: Evaluate
    export: Export | None

    @property
    def finetune(self) -> Finetune:
        return self.classifier.network if isinstance(self.classifier, BlendStage) else self.classifier

    @property
    def stages(self) -> list[Stage[Any]]:
        """All of them, in the order of the pipeline."""
        ngrams = [self.classifier.ngrams] if isinstance(self.classifier, BlendStage) else []
        made: list[Stage[Any]] = [self.labels, *self.evaluate.baselines, *ngrams, self.adapted]
        for classifier in (self.classifier, *self.rivals):
            made += [classifier] if isinstance(classifier, Finetune) else [classifier.network, classifier]
        return [*made, self.evaluate, *([self.export] if self.export else [])]


@dataclass(frozen=True)
class Graph:
    """The stages of one pipeline: those that lead to the base model, and a branch for each task by its name."""

    trunk: list[Stage[Any]]
    branches: Mapping[str, Branch]

    @property
    def targets(self) -> list[Stage[Any]]:
        """What a run is asked for, in the order of the pipeline; what else they need, it makes on the way."""
        branches = [stage for branch in self.branches.values() for stage in branch.stages]
        return [*self.trunk, *(stage for stage in branches if stage not in self.trunk)]

    @property
    def exports(self) -> list[Export]:
        return [branch.export for branch in self.branches.values() if branch.export]


def assemble(config: PipelineConfig) -> Graph:
    """Wire the stages of a pipeline."""
    corpus = CorpusStage(config=config.corpus) if config.corpus else None
    if config.init_from is not None:
        tokenizer = ImportTokenizer(folder=config.init_from)
        base = ImportModel(folder=config.init_from, model=start(config, config.init_from), tokenizer=tokenizer)
    else:
        assert corpus is not None, "without a model to start from there is a corpus"
        tokenizer, base = TokenizerStage(config=config.tokenizer, corpus=corpus), None
    trunk = [corpus, tokenizer, base]
    if corpus and config.pretrain:
        shards = ShardsStage(config=config.shards, corpus=corpus, tokenizer=tokenizer)
        base = pretrain(config, config.pretrain, shards, base)
        trunk += [shards, base]
        if config.midtrain:
            base = pretrain(config, config.midtrain, shards, base, label="midtrain", section="midtrain")
            trunk.append(base)
    assert base is not None, "there is a model to start from, or pretraining"
    learned = corpus if config.pretrain else None
    branches = {name: branch(config, name, task, base, learned) for name, task in config.all_tasks.items()}
    return Graph([stage for stage in trunk if stage is not None], branches)


def pretrain(
    config: PipelineConfig,
    training: PretrainConfig,
    shards: ShardsStage,
    base: Base | None,
    *,
    label: str = "",
    section: str = "pretrain",
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
        section=section,
    )


def shape(config: PipelineConfig, objective: str) -> ModelConfig:
    """The model that an objective wants: whether it reads both ways, and the tokens it needs past the vocabulary."""
    wanted = pretraining(objective)
    if config.init_from is None:
        return config.model.resolve(config.tokenizer.vocab_size + wanted.EXTRA_TOKENS, causal=wanted.CAUSAL)
    begun = start(config, config.init_from)
    return replace(begun, vocab_size=begun.vocab_size + wanted.EXTRA_TOKENS, causal=wanted.CAUSAL)


def start(config: PipelineConfig, folder: str) -> ModelConfig:
    """The model to start from, with what its weights leave to the config."""
    given, section = model_config(folder), config.model
    return replace(
        given,
        seq_len=min(given.seq_len, section.seq_len),
        dropout=section.dropout,
        sliding_window=section.sliding_window or given.sliding_window,
        attention=section.attention,
    )


def branch(config: PipelineConfig, name: str, task: TaskConfig, base: Base, corpus: CorpusStage | None) -> Branch:
    """Wire the stages of one task onto the base, which has been trained on the corpus."""
    labels = LabelsStage(config=task.labels, label=name, section=of_task(name, "labels"))
    adapted = adapt(config, name, task.adapt, labels, base) if task.adapt else base
    finetune = Finetune(
        config=task.finetune.resolve(),
        base=adapted,
        model=adapted.model,
        tokenizer=base.tokenizer,
        labels=labels,
        seed=config.seed,
        label=name,
        section=of_task(name, "finetune"),
    )
    classifier = reading_ngrams(name, task, finetune)
    repeats = tuple(
        reading_ngrams(name, task, replace(finetune, seed=config.seed + n, label=joined(name, f"seed-{n}")))
        for n in range(1, config.evaluate.seeds)
    )
    from_random = reading_ngrams(name, task, replace(finetune, base=None, label=joined(name, "random-init")))
    random_init = from_random if config.evaluate.random_init else None
    baselines = tuple(
        Baseline(rival=rival, labels=labels, label=joined(name, rival)) for rival in config.evaluate.baselines
    )
    evaluate = Evaluate(
        config=config.evaluate,
        classifier=classifier,
        labels=labels,
        corpus=corpus if config.evaluate.contamination else None,
        random_init=random_init,
        repeats=repeats,
        baselines=baselines,
        seed=config.seed,
        label=name,
    )
    export = config.export and Export(
        config=config.export, classifier=classifier, labels=labels, evaluation=evaluate, label=name
    )
    rivals = (*repeats, random_init) if random_init else repeats
    return Branch(labels, adapted, classifier, rivals, evaluate, export)


def reading_ngrams(name: str, task: TaskConfig, finetune: Finetune) -> Classifier:
    """Wire n-grams beside a network, if the task wants them."""
    if task.ngrams is None:
        return finetune
    ngrams = NGramsStage(
        config=task.ngrams,
        tokenizer=finetune.tokenizer,
        labels=finetune.labels,
        seq_len=finetune.shape.seq_len,
        reading=finetune.config.reading,
        label=name,
        section=of_task(name, "ngrams"),
    )
    return BlendStage(network=finetune, ngrams=ngrams, labels=finetune.labels, label=finetune.label)


def adapt(config: PipelineConfig, name: str, training: PretrainConfig, labels: LabelsStage, base: Base) -> Pretrain:
    """Wire pretraining that goes on from the base with the training texts of a task."""
    text, label = TaskText(labels=labels, label=name), joined(name, "adapt")
    shards = ShardsStage(config=config.shards, corpus=text, tokenizer=base.tokenizer, label=label)
    return pretrain(config, training, shards, base, label=label, section=of_task(name, "adapt"))


def of_task(task: str, section: str) -> str:
    """Where in a config a section of a task stands; that of the only task is the pipeline's."""
    return f"tasks.{task}.{section}" if task else section


def joined(*names: str) -> str:
    return "-".join(name for name in names if name)
