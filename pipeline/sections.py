"""Sections of a config that belong to no stage: the size of the model, where a run takes place, what it is called."""

from dataclasses import dataclass, fields
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from pydantic import StringConstraints

from model.config import ModelConfig
from pipeline.identity import knob

Count = Annotated[int, Ge(1)]

Name = Annotated[str, StringConstraints(pattern=r"^\w[\w. -]*$")]
"""What MLflow takes for the name of a model and of a tag alike, and its searches need not quote."""

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
    """Tokens in a training row, and the longest text that a classifier reads in one piece."""
    rope_theta: Annotated[float, Gt(0)] = 10_000.0
    """Base of the rotary wavelengths."""
    tie_embeddings: bool = True
    """Whether the language-model head reuses the embedding matrix."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout of pretraining; fine-tuning has its own."""
    sliding_window: Count | None = None
    """Tokens that a token sees, counting backwards; null is all. A stock Llama export needs null."""
    attention: str = knob("auto")
    """Attention kernel: auto, flash, matmul, reference or sdpa."""

    def __post_init__(self) -> None:
        self.resolve(vocab_size=1)  # a shape that cannot be is refused where it is written

    @property
    def fixed_by_weights(self) -> list[str]:
        """The fields that given weights leave no choice in, those of them that are not at their defaults."""
        free = {"seq_len", "dropout", "sliding_window", "attention"}
        return [f.name for f in fields(self) if f.name not in free and getattr(self, f.name) != f.default]

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

    name: Name | None = knob(None)
    """Name of the registered model. Default: the name of the pipeline."""
    promote: bool = knob(False)
    """Make a registered model the champion at the end of the run, if it passes the gates of `gristmill promote`."""
