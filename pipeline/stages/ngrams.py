"""N-grams beside the network: a linear model of the same tokens has its say in a fine-tuned classifier."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float32

from model.blend import Blend
from model.ngrams import FEWEST_BYTES, NGrams
from pipeline.classify import document_probabilities, tokenize_windows
from pipeline.errors import UsageError
from pipeline.identity import added
from pipeline.metrics import validated
from pipeline.ngrams import features, fill, fit, learned_table, logits_of
from pipeline.splitting import LabelledSplit
from pipeline.stage import Context, Resources, Stage
from pipeline.stages.finetune import Finetune
from pipeline.stages.labels import Labels
from pipeline.targets import Targets
from pipeline.weights import TOKENIZER, ClassifierFiles, LoadedClassifier, write_classifier
from pipeline.windows import loss_weights, mean_over_windows

MOST_TOKENS = 2**22
"""So many of the training texts' tokens are learned from, each of which brings some twenty n-grams into memory."""


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


@dataclass(frozen=True, kw_only=True)
class NGramsStage(Stage[ClassifierFiles]):
    """Makes of a classifier one that reads n-grams too (wide and deep, arXiv:1606.07792).

    They learn from the training texts; how much they count beside the network, the new validation texts say. Then they
    learn from both, as a linear classifier by itself would. What was said before that of the validation texts is kept:
    only by it can one tell how sure the classifier may be.
    """

    VERSION = 5
    config: NGramsConfig
    classifier: Finetune
    labels: Stage[Labels]

    @property
    def resources(self) -> Resources:
        return Resources(cpus=0)

    def load(self, path: Path) -> ClassifierFiles:
        return ClassifierFiles(path)

    def run(self, ctx: Context) -> None:
        torch.set_num_threads(ctx.cpus)
        labels, files = ctx.open(self.labels), ctx.open(self.classifier)
        loaded = files.load()
        model = loaded.model
        known, asked = (Read.of(loaded, split) for split in (labels.split("train"), labels.new_validation()))
        if not asked.texts:
            raise UsageError(
                "ngrams: there are no validation texts to say how much n-grams count beside the network; "
                "set labels.validation_fraction above 0 and give each class two texts or more, or set ngrams to null"
            )
        network = logits_of(document_probabilities(model, asked.alone), multi_label=labels.multi_label)
        spelling = loaded.spelling if self.config.bytes else None
        model.ngrams = NGrams(len(labels.names), self.config.order, self.config.buckets, spelling, self.config.bytes)
        table = self._table(model.ngrams, known)
        fit(model.ngrams.blend, asked.targets, network, features(model.ngrams, asked.windows) @ table, asked.counts)
        fill(model.ngrams, table)
        held_out = document_probabilities(model, asked.texts)
        fill(model.ngrams, self._table(model.ngrams, known.and_(Read.of(loaded, labels.split("validation")))))
        write_classifier(
            ctx.out,
            dict(model.named_parameters()),
            model.cfg,
            labels.names,
            model.head.pooling,
            files.path / TOKENIZER,
            loaded.windows,
            multi_label=labels.multi_label,
            ngrams=model.ngrams,
            held_out=held_out,
        )
        before = model.probabilities(mean_over_windows(torch.from_numpy(network), asked.counts)).numpy()
        _note(ctx, model.ngrams.blend, *(validated(asked.targets, said) for said in (before, held_out)))
        ctx.notes["datasets"] = [ctx.dataset(self.labels, split) for split in ("train", "validation")]

    def _table(self, ngrams: NGrams, read: "Read") -> Float32[np.ndarray, "buckets n_labels"]:
        """What n-grams say of the labels of some texts."""
        known = read.thinned(MOST_TOKENS)
        targets = np.repeat(known.targets, known.counts, axis=0)
        n_labels, strength = ngrams.tokens.table.shape[1], self.config.strength
        return learned_table(features(ngrams, known.windows), targets, n_labels, strength, loss_weights(known.counts))


@dataclass(frozen=True, eq=False)
class Read:
    """Texts as a classifier reads them: the token ids of each one's windows; and what is true of them."""

    texts: list[list[np.ndarray]]
    targets: Targets

    @classmethod
    def of(cls, loaded: LoadedClassifier, split: LabelledSplit) -> "Read":
        return cls(
            tokenize_windows(loaded.tokenizer, split.texts, loaded.model.cfg.seq_len, loaded.windows), split.targets
        )

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
    def alone(self) -> list[list[np.ndarray]]:
        """Each window as if it were a text."""
        return [[window] for window in self.windows]

    @property
    def counts(self) -> list[int]:
        """Windows of each text."""
        return [len(text) for text in self.texts]


def _note(ctx: Context, blend: Blend, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    ctx.notes["metrics"] = {
        **{f"val/{name}": value for name, value in after.items()},
        **{f"val/network_{name}": value for name, value in before.items()},
        **{f"ngrams/deep_{n}": by[0].item() for n, by in enumerate(blend.by, 1)},
        **{f"ngrams/wide_{n}": by[1].item() for n, by in enumerate(blend.by, 1)},
        "ngrams/share_1": blend.share.sigmoid().item(),
    }
    ctx.notes["headline"] = (
        f"validation macro-F1 {before['macro_f1']:.3f} -> {after['macro_f1']:.3f}, "
        f"log loss {before['log_loss']:.3f} -> {after['log_loss']:.3f}"
    )
    ctx.notes["model"] = {"role": "classifier-weights"}
