"""What n-grams say of a label by themselves: a linear model of the tokens that a network reads, and of their bytes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from model.ngrams import FEWEST_BYTES, NGrams
from pipeline.classify import tokenize_windows
from pipeline.errors import UsageError
from pipeline.identity import added
from pipeline.ngrams import Table, features, learned_table
from pipeline.spelling import blank_ngrams
from pipeline.splitting import LabelledSplit
from pipeline.stage import Context, Resources, Stage
from pipeline.stages.labels import Labels
from pipeline.stages.tokenizer import TokenizerFile
from pipeline.targets import Targets
from pipeline.windows import Windows, loss_weights

MOST_TOKENS = 2**22
"""So many of the texts' tokens are learned from, each of which brings some twenty n-grams into memory."""
TABLES, SHAPE = "tables.safetensors", "ngrams.json"


@dataclass(frozen=True, kw_only=True)
class NGramsConfig:
    """What is learned of n-grams, in seconds or minutes, and blended with what the network says."""

    order: Annotated[int, Ge(1), Le(8)] = 3
    """Tokens in the longest n-gram; shorter ones are read too."""
    bytes: Annotated[int, Ge(0), Le(8)] = added(5, birth=0)
    """Bytes in the longest n-gram of a text's bytes, the shortest of which have 2; 0 reads tokens only."""
    buckets: Annotated[int, Ge(1), Le(2**24)] = 2**18
    """Rows of the table that n-grams of tokens are hashed to, and of that of bytes, each a float32 for every class."""
    strength: Annotated[float, Gt(0)] = 0.5
    """Inverse regularisation of the logistic regression."""

    def __post_init__(self) -> None:
        if 0 < self.bytes < FEWEST_BYTES:
            raise ValueError(f"bytes={self.bytes} must be 0, or {FEWEST_BYTES} or more")


@dataclass(frozen=True)
class LearnedNGrams:
    """Two tables of what n-grams say, and the shape of the `NGrams` that they fill."""

    path: Path

    @property
    def shape(self) -> dict[str, int]:
        """As of `NGrams.shape`."""
        return json.loads((self.path / SHAPE).read_text())

    def tables(self) -> tuple[Table, Table]:
        """What the training texts say, and what the validation texts say as well."""
        tables = load_file(self.path / TABLES)
        return tables["train"], tables["train_validation"]


@dataclass(frozen=True, kw_only=True)
class NGramsStage(Stage[LearnedNGrams]):
    """Learns from the training texts, and then from these and the validation texts, as a linear classifier would.

    It reads the windows of `seq_len` tokens that the network beside it does, but knows nothing of that network: all
    seeds of one, and all trials of a search that read the same windows, share what was learned here.
    """

    VERSION = 6
    config: NGramsConfig
    tokenizer: Stage[TokenizerFile]
    labels: Stage[Labels]
    seq_len: int
    reading: Windows

    @property
    def resources(self) -> Resources:
        """The machine for itself: one core computes, but the n-grams of many texts take gigabytes."""
        return Resources(cpus=0)

    def load(self, path: Path) -> LearnedNGrams:
        return LearnedNGrams(path)

    def run(self, ctx: Context) -> None:
        torch.set_num_threads(ctx.cpus)
        labels, tokenizer = ctx.open(self.labels), ctx.open(self.tokenizer).load()
        train, validation = (self._read(tokenizer, labels.split(split)) for split in ("train", "validation"))
        if not validation.texts:
            raise UsageError(
                "ngrams: there are no validation texts to say how much n-grams count beside the network; "
                "set labels.validation_fraction above 0 and give each class two texts or more, or set ngrams to null"
            )
        cfg, progress = self.config, partial(ctx.tracker.progress, text="regressions learned")
        shape = {"order": cfg.order, "buckets": cfg.buckets, "bytes": cfg.bytes}
        ngrams = blank_ngrams(shape, len(labels.names), tokenizer, max(tokenizer.get_vocab().values()) + 1)
        tables = {
            "train": self._table(ngrams, train, lambda done, n: progress(done, 2 * n)),
            "train_validation": self._table(ngrams, train.and_(validation), lambda done, n: progress(n + done, 2 * n)),
        }
        save_file(tables, ctx.out / TABLES)
        (ctx.out / SHAPE).write_text(json.dumps(shape) + "\n")
        ctx.notes["headline"] = f"{len(train.texts) + len(validation.texts):,} texts, {len(labels.names)} classes"
        ctx.notes["datasets"] = [ctx.dataset(self.labels, split) for split in ("train", "validation")]

    def _read(self, tokenizer: Tokenizer, split: LabelledSplit) -> "Read":
        return Read(tokenize_windows(tokenizer, split.texts, self.seq_len, self.reading), split.targets)

    def _table(self, ngrams: NGrams, read: "Read", on_progress: Callable[[int, int], None]) -> Table:
        """What n-grams say of the labels of some texts."""
        known = read.thinned(MOST_TOKENS)
        targets, weights = np.repeat(known.targets, known.counts, axis=0), loss_weights(known.counts)
        n_labels, strength = ngrams.tokens.table.shape[1], self.config.strength
        return learned_table(features(ngrams, known.windows), targets, n_labels, strength, weights, on_progress)


@dataclass(frozen=True, eq=False)
class Read:
    """Texts as a classifier reads them: the token ids of each one's windows; and what is true of them."""

    texts: list[list[np.ndarray]]
    targets: Targets

    def and_(self, others: "Read") -> "Read":
        """These texts and, behind them, others."""
        return Read(self.texts + others.texts, np.concatenate([self.targets, others.targets]))

    def thinned(self, most_tokens: int) -> "Read":
        """So many of the texts, evenly spread, that they have no more tokens than about so many."""
        share = most_tokens / max(most_tokens, sum(len(window) for text in self.texts for window in text))
        chosen = np.linspace(0, len(self.texts), max(1, int(share * len(self.texts))), endpoint=False).astype(int)
        return Read([self.texts[i] for i in chosen], self.targets[chosen])

    @property
    def windows(self) -> list[np.ndarray]:
        return [window for text in self.texts for window in text]

    @property
    def counts(self) -> list[int]:
        """Windows of each text."""
        return [len(text) for text in self.texts]
