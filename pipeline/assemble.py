"""Where everything is wired: one config in, the graph of stages out. Read this to learn what a pipeline is."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt, MinLen

from model.config import ModelConfig
from model.objectives import pretraining
from pipeline.identity import knob
from pipeline.stage import Stage
from pipeline.stages.corpus import CorpusConfig, CorpusStage
from pipeline.stages.evaluate import Evaluate, EvaluateConfig
from pipeline.stages.export import Export, ExportConfig
from pipeline.stages.finetune import Finetune, FinetuneConfig
from pipeline.stages.labels import LabelsConfig, LabelsStage
from pipeline.stages.pretrain import Pretrain, PretrainConfig
from pipeline.stages.shards import ShardsConfig, ShardsStage
from pipeline.stages.tokenizer import TokenizerConfig, TokenizerStage

Count = Annotated[int, Ge(1)]

HEAD_DIM = 64
"""Channels of a head where the config names no heads: the size that attention kernels are fastest at."""


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The size of the model: one dial, `depth`, or the field's own numbers. What is given wins over what is derived."""

    depth: Count | None = None
    """One dial for the size: depth layers, d_model = 64 x depth. Any field below replaces its derived value."""
    d_model: Count | None = None
    """Width of the residual stream."""
    n_layers: Count | None = None
    """Blocks, each one attention and one MLP."""
    n_heads: Count | None = None
    """Query heads. Derived: d_model / 64."""
    n_kv_heads: Count | None = None
    """Key and value heads, shared by groups of query heads. Derived: n_heads."""
    d_ff: Count | None = None
    """Hidden width of the gated MLP. Derived: 8/3 of d_model, rounded up to a multiple of 64."""
    seq_len: Count = 512
    """Tokens in a training row, and the longest text that a classifier reads."""
    rope_theta: Annotated[float, Gt(0)] = 10_000.0
    """Base of the rotary wavelengths."""
    tie_embeddings: bool = True
    """Whether the language-model head reuses the embedding matrix."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout of pretraining; fine-tuning has its own."""
    sliding_window: Count | None = None
    """Tokens that a token sees, counting backwards; null is all. A stock Llama export needs null."""
    attention: str = knob("auto")
    """Attention kernel: auto, reference, sdpa or flash."""

    def __post_init__(self) -> None:
        self.resolve(vocab_size=1)  # a shape that cannot be is refused where it is written

    def resolve(self, vocab_size: int, *, causal: bool = True) -> ModelConfig:
        """The config with every derived value filled in."""
        depth, d_model = self.depth or 6, self.d_model or HEAD_DIM * (self.depth or 6)
        n_heads = self.n_heads or max(1, d_model // HEAD_DIM)
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=self.n_layers or depth,
            n_heads=n_heads,
            n_kv_heads=self.n_kv_heads or n_heads,
            d_ff=self.d_ff or -(-8 * d_model // (3 * 64)) * 64,
            seq_len=self.seq_len,
            rope_theta=self.rope_theta,
            tie_embeddings=self.tie_embeddings,
            dropout=self.dropout,
            sliding_window=self.sliding_window,
            causal=causal,
            attention=self.attention,
        )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where the stages run. Nothing here changes what they make."""

    workers: Count | tuple[Count, Count] = knob(1)
    """Training processes, one a GPU or a share of the CPU cores; [fewest, most] goes on with what there is."""
    cpus: Annotated[int, Ge(0)] = knob(0)
    """CPU cores to use; 0 means all of this machine."""
    address: str | None = knob(None)
    """Ray cluster to run on, as ray.init takes it. Default: RAY_ADDRESS, or a Ray of this run's own on this machine."""
    store: str | None = knob(None)
    """fsspec URL (s3://bucket/folder, gs://, file://) where artifacts and checkpoints are shared between machines."""
    timeout_seconds: Annotated[float, Gt(0)] = knob(60.0)
    """How long a training process may be silent before it counts as lost."""
    retries: Annotated[int, Ge(0)] = knob(3)
    """Losses in a row, with no progress between them, that a run gets over by itself."""

    def __post_init__(self) -> None:
        if not isinstance(self.workers, int) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers={list(self.workers)} must be [fewest, most]")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where experiments are followed."""

    uri: str | None = knob(None)
    """MLflow tracking URI. Default: an sqlite file under GRISTMILL_HOME."""


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """What the classifier is called where models are registered."""

    name: Annotated[str, MinLen(1)] | None = knob(None)
    """Name of the registered model. Default: the name of the pipeline."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """One config file: raw text in, a registered classifier out."""

    name: Annotated[str, MinLen(1)]
    """Name of the pipeline: the MLflow experiment, and the registered model unless `register.name` says otherwise."""
    seed: int = 0
    """Seed of everything random: data order, initial weights, dropout, splits, bootstrap."""
    corpus: CorpusConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    shards: ShardsConfig = ShardsConfig()
    model: ModelSection = ModelSection()
    pretrain: PretrainConfig
    labels: LabelsConfig | None = None
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig | None = ExportConfig()
    """null makes and registers none: for a classifier without a stock Llama form, such as one with mean pooling."""
    cluster: ClusterConfig = knob(default_factory=ClusterConfig)
    tracking: TrackingConfig = knob(default_factory=TrackingConfig)
    register: RegisterConfig = knob(default_factory=RegisterConfig)

    def __post_init__(self) -> None:
        for section, settings in (("pretrain", self.pretrain), ("finetune", self.finetune)):
            if self.cluster.workers != 1 and settings.engine == "plain":
                raise ValueError(
                    f"cluster.workers={self.cluster.workers} needs {section}.engine auto or deepspeed, not plain"
                )


@dataclass(frozen=True)
class Graph:
    """The stages of one pipeline, by role. `labels` and what follows are None where the config has no labels."""

    corpus: CorpusStage
    tokenizer: TokenizerStage
    shards: ShardsStage
    pretrain: Pretrain
    labels: LabelsStage | None = None
    finetune: Finetune | None = None
    random_init: Finetune | None = None
    evaluate: Evaluate | None = None
    export: Export | None = None

    @property
    def targets(self) -> list[Stage[Any]]:
        """What a run makes: every stage that is there, in the order of the pipeline."""
        return [stage for f in fields(self) if (stage := getattr(self, f.name)) is not None]


def assemble(config: PipelineConfig) -> Graph:
    """Wire the stages of a pipeline."""
    corpus = CorpusStage(config=config.corpus)
    tokenizer = TokenizerStage(config=config.tokenizer, corpus=corpus)
    shards = ShardsStage(config=config.shards, corpus=corpus, tokenizer=tokenizer)
    objective = pretraining(config.pretrain.objective)
    vocab_size = config.tokenizer.vocab_size + objective.EXTRA_TOKENS
    model = config.model.resolve(vocab_size, causal=objective.CAUSAL)
    base = Pretrain(config=config.pretrain.resolve(), model=model, shards=shards, tokenizer=tokenizer, seed=config.seed)
    if config.labels is None:
        return Graph(corpus, tokenizer, shards, base)

    labels = LabelsStage(config=config.labels, seed=config.seed)
    classifier = Finetune(
        config=config.finetune.resolve(), base=base, model=model, tokenizer=tokenizer, labels=labels, seed=config.seed
    )
    from_random = replace(classifier, base=None, label="random-init") if config.evaluate.random_init else None
    scores = Evaluate(
        config=config.evaluate, classifier=classifier, labels=labels, random_init=from_random, seed=config.seed
    )
    export = config.export and Export(config=config.export, classifier=classifier, labels=labels, evaluation=scores)
    return Graph(corpus, tokenizer, shards, base, labels, classifier, from_random, scores, export)
