"""A classifier for other programs, one module a format: what it writes, what reads it, what it cannot express.

Contract: a module here defines

- `PROGRAM`: the name of the foreign program that must compute our logits from the folder before it is published;
- `PACKAGES`: the optional packages that writing and checking import, brought by the extra of the format's name;
- `refusal(cfg, pooling, ngrams=...)`: the setting that the format cannot express and what to use instead, or None;
- `write(folder, subject)`: the files, equal bytes for equal classifiers;
- `logits(folder, expected)`: `{how: logits}` as PROGRAM gives them for the texts. Raises StageFailed where it reads
  other tokens or labels.

Adding a format means adding one file; `tests/pipeline/test_formats.py` then checks it without being edited.
"""

import copy
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, cast

import torch

from model import variants
from model.config import ModelConfig
from model.interchange import CALIBRATION, read_classifier
from pipeline import publish
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.export._verify import Expected, Logits, compare
from pipeline.export._verify import expected as expected
from pipeline.export._verify import verification_texts as verification_texts
from pipeline.export._verify import vocabulary_texts as vocabulary_texts
from pipeline.tokens import load_tokenizer
from pipeline.weights import CONFIG, TOKENIZER, ClassifierFiles, LoadedClassifier
from pipeline.windows import Windows

AUTO = "auto"
HF_CONFIG = "config.json"
CARD = "README.md"
READABLE = ("hf", "onnx")
"""Formats that this package reads back, in the order of preference: a registered model begins with one of them."""


@dataclass(frozen=True)
class Subject:
    """A classifier to write: float32 weights on the CPU that give calibrated logits, and the file of its tokenizer.

    `temperature` is what the head was divided by.
    """

    loaded: LoadedClassifier
    tokenizer: Path
    temperature: float


class Format(Protocol):
    """What a module of this folder is."""

    PROGRAM: str
    PACKAGES: tuple[str, ...]

    def refusal(self, cfg: ModelConfig, pooling: str, *, ngrams: bool = False) -> str | None: ...
    def write(self, folder: Path, subject: Subject) -> None: ...
    def logits(self, folder: Path, expected: Expected) -> Mapping[str, Logits]: ...


def names() -> list[str]:
    """The formats there are."""
    return variants.names(__name__)


def load(name: str) -> Format:
    """One format. Raises ValueError, listing the choices, for a name that is none."""
    return cast(Format, variants.load(__name__, name))


def choose(formats: Sequence[str], cfg: ModelConfig, pooling: str, *, ngrams: bool = False) -> list[str]:
    """The formats to write, with "auto" decided: the first of READABLE that can express the classifier.

    Raises UsageError, naming the setting, for a format that cannot.
    """
    auto = next((name for name in READABLE if load(name).refusal(cfg, pooling, ngrams=ngrams) is None), READABLE[-1])
    chosen = list(dict.fromkeys(auto if name == AUTO else name for name in formats))
    for name in chosen:
        refuse(name, cfg, pooling, ngrams=ngrams)
    return chosen


def refuse(name: str, cfg: ModelConfig, pooling: str, *, ngrams: bool = False) -> None:
    """Raises UsageError where a format cannot express a classifier."""
    reason = load(name).refusal(cfg, pooling, ngrams=ngrams)
    if reason is not None:
        raise UsageError(f"{reason}, so the classifier cannot be exported as {name}")


def require(name: str) -> None:
    """Raises EnvironmentProblem where a package of a format is missing."""
    missing = [package for package in load(name).PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise EnvironmentProblem(
            f"the export format {name} needs {', '.join(missing)}, not installed here: pip install 'gristmill[{name}]'"
        )


def calibrated(loaded: LoadedClassifier, tokenizer: Path, temperature: float) -> Subject:
    """The classifier with its logits divided by a temperature above 0 (Guo et al., arXiv:1706.04599), as a copy."""
    model = copy.deepcopy(loaded.model).float().cpu()
    with torch.no_grad():
        model.logit_weight.div_(temperature)
    return Subject(replace(loaded, model=model), tokenizer, temperature)


def read(folder: Path) -> Subject:
    """The classifier of an export in a format of READABLE, or of a classifier artifact.

    Raises UsageError where there is none, and DamagedArtifact where a file has other bytes than its manifest says, but
    for the card, in which people write.
    """
    if (manifest := publish.read_manifest(folder)) is not None:
        for name in manifest.files.keys() - {CARD}:
            publish.verify_file(folder, name, manifest, folder)
    try:
        if (folder / CONFIG).is_file():
            record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            loaded = ClassifierFiles(folder).load()
        elif (folder / HF_CONFIG).is_file():
            record = json.loads((folder / HF_CONFIG).read_text(encoding="utf-8"))
            model, id2label = read_classifier(folder)
            labels = [id2label[i] for i in range(len(id2label))]
            windows = Windows.of(record, model.cfg.seq_len)
            loaded = LoadedClassifier(model.float(), load_tokenizer(folder / TOKENIZER), labels, windows)
        else:
            raise UsageError(f"{folder}: neither {HF_CONFIG} nor {CONFIG}, so there is no classifier here")
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder}: no classifier that can be read: {error}") from error
    return Subject(loaded, folder / TOKENIZER, float(record.get(CALIBRATION, 1.0)))


def export(name: str, folder: Path, subject: Subject, expected: Expected, tolerance: float) -> float:
    """Write one format and have its program compute from it; the largest difference of any logit.

    Raises UsageError, EnvironmentProblem, or StageFailed where a logit differs by more than `tolerance`, absolute, or
    relative to the largest logit where that is above 1.
    """
    model = subject.loaded.model
    refuse(name, model.cfg, model.head.pooling, ngrams=model.ngrams is not None)
    require(name)
    format_ = load(name)
    folder.mkdir(parents=True, exist_ok=True)
    format_.write(folder, subject)
    return compare(format_.PROGRAM, format_.logits(folder, expected), expected, tolerance)
