"""Models on disk between stages: `model.safetensors`, the config as JSON, and the tokenizer they were made with."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.config import ModelConfig
from model.decoder import Decoder
from model.heads import Classifier, LanguageModel
from model.interchange import read_safetensors
from model.ngrams import NGrams
from pipeline.errors import DataError, UsageError
from pipeline.identity import canonical
from pipeline.spelling import blank_ngrams
from pipeline.targets import Probabilities
from pipeline.tokens import load_tokenizer
from pipeline.windows import ONE_WINDOW, Windows

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "model.json", "tokenizer.json"
HELD_OUT = "held_out.npy"
EMBEDDING, HEAD = "body.embed.weight", "head.weight"
"""What a language model may share between its two ends."""
COUNTS = "log, a bag of each"
"""How n-grams are counted and kept: classifiers without these words were made before that."""


@dataclass(frozen=True)
class LoadedLanguageModel:
    model: LanguageModel
    tokenizer: Tokenizer


@dataclass(frozen=True)
class LoadedClassifier:
    """A classifier ready to use. `labels[i]` is the name of logit i, `windows` how it reads a long text."""

    model: Classifier
    tokenizer: Tokenizer
    labels: list[str]
    windows: Windows = ONE_WINDOW

    @property
    def multi_label(self) -> bool:
        """Whether it may give a text several labels, or none."""
        return self.model.head.multi_label


@dataclass(frozen=True)
class LanguageModelFiles:
    path: Path

    @property
    def config(self) -> ModelConfig:
        return _shape(_record(self.path), self.path)

    def load(self) -> LoadedLanguageModel:
        model = LanguageModel(self.config)
        _fill(model, _weights(self.path), self.path)
        return LoadedLanguageModel(model, load_tokenizer(self.path / TOKENIZER))


@dataclass(frozen=True)
class ClassifierFiles:
    path: Path

    @property
    def held_out(self) -> Probabilities | None:
        """What it said of the new validation texts before it learned from these; None where it has not."""
        path = self.path / HELD_OUT
        return np.load(path) if path.exists() else None

    def load(self) -> LoadedClassifier:
        record = _record(self.path)
        body, n_labels = Decoder(_shape(record, self.path)), len(record["labels"])
        tokenizer = load_tokenizer(self.path / TOKENIZER)
        ngrams = self._ngrams(record, tokenizer) if "ngrams" in record else None
        multi_label = record.get("multi_label", False)
        model = Classifier(body, n_labels, record["pooling"], multi_label=multi_label, ngrams=ngrams)
        _fill(model, _weights(self.path), self.path)
        windows = Windows.of(record, body.cfg.seq_len)
        return LoadedClassifier(model, tokenizer, record["labels"], windows)

    def _ngrams(self, record: Mapping[str, Any], tokenizer: Tokenizer) -> NGrams:
        wide = record["ngrams"]
        if wide.get("counts") != COUNTS:
            raise UsageError(f"{self.path} is of a gristmill that counted n-grams otherwise; run its pipeline again")
        return blank_ngrams(wide, len(record["labels"]), tokenizer, record["model"]["vocab_size"])


def read_body(folder: Path, cfg: ModelConfig) -> LanguageModel:
    """A language model of shape `cfg` with the weights of a model in our own form, or of its body. Raises DataError.

    A classifier's head is left behind, and the embedding becomes the head.
    """
    weights = _weights(folder)
    state = {name: weight for name, weight in weights.items() if name.startswith("body.")}
    if not cfg.tie_embeddings and EMBEDDING in weights:
        state[HEAD] = weights.get(HEAD, weights[EMBEDDING])
    model = LanguageModel(cfg)
    _fill(model, state, folder)
    return model


def write_language_model(folder: Path, params: Mapping[str, Tensor], cfg: ModelConfig, tokenizer: Path) -> None:
    """Write weights by name (float32, ties stored once) and what is needed to load them again."""
    _write(folder, params, {"model": canonical(cfg)}, tokenizer)


def write_classifier(
    folder: Path,
    params: Mapping[str, Tensor],
    cfg: ModelConfig,
    labels: list[str],
    pooling: str,
    tokenizer: Path,
    windows: Windows = ONE_WINDOW,
    *,
    multi_label: bool = False,
    ngrams: NGrams | None = None,
    held_out: Probabilities | None = None,
) -> None:
    """As `write_language_model`, with the names of the labels in the order of the logits, and whether they exclude
    each other (the record says `multi_label` only where they do not, and `ngrams` only where they are read).

    `held_out` is what `ClassifierFiles.held_out` gives.
    """
    several = {"multi_label": True} if multi_label else {}
    read = {} if ngrams is None else {"ngrams": {**ngrams.shape, "counts": COUNTS}}
    record = {"model": canonical(cfg), "labels": labels, "pooling": pooling, **windows.record, **several, **read}
    _write(folder, params, record, tokenizer)
    if held_out is not None:
        np.save(folder / HELD_OUT, held_out)


def _write(folder: Path, params: Mapping[str, Tensor], record: dict[str, Any], tokenizer: Path) -> None:
    save_file({name: value.contiguous() for name, value in params.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    shutil.copyfile(tokenizer, folder / TOKENIZER)


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / CONFIG}: cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{folder / CONFIG}: no JSON object")
    return record


def _shape(record: Mapping[str, Any], folder: Path) -> ModelConfig:
    try:
        return ModelConfig(**record["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / CONFIG}: model: {error}") from error


def _weights(folder: Path) -> dict[str, Tensor]:
    try:
        return read_safetensors(folder / WEIGHTS)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / WEIGHTS}: cannot be read: {error}") from error


def _fill(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Copy weights into a model by name; a tied weight is stored under one of its names only. Raises DataError."""
    ours = {name: parameter.shape for name, parameter in model.named_parameters()}
    theirs = {name: weight.shape for name, weight in state.items()}
    if misfits := sorted(name for name, _ in ours.items() ^ theirs.items()):
        names = ", ".join(dict.fromkeys(misfits))
        raise DataError(f"{folder / WEIGHTS}: not the weights of a {type(model).__name__} of this shape: {names}")
    model.load_state_dict(state, strict=False)
