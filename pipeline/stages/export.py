"""The classifier as a stock Hugging Face folder, published only after transformers computed our logits from it."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, MinLen
from jaxtyping import Float32
from torch import Tensor

from model.interchange import write_classifier
from pipeline.classify import tokenize
from pipeline.errors import StageFailed, UsageError
from pipeline.model_card import ModelFacts, model_card
from pipeline.stage import Context, Stage
from pipeline.stages.evaluate import Evaluation
from pipeline.stages.finetune import Finetune
from pipeline.stages.labels import Labels
from pipeline.tokens import EOS, PAD, SPECIAL
from pipeline.weights import TOKENIZER, ClassifierFiles, LoadedClassifier

Logits = Float32[Tensor, "texts labels"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How the classifier is handed over."""

    format: Literal["hf"] = "hf"
    """hf: a Hugging Face folder, LlamaForSequenceClassification."""
    verify_texts: Annotated[int, Ge(1), Le(10_000)] = 16
    """Test texts, from the shortest to the longest, on which the export must give our logits."""
    tolerance: Annotated[float, Gt(0), Le(1e-2)] = 1e-5
    """Largest difference of a logit, absolute, or relative to the largest logit where that is above 1."""
    language: Annotated[str, MinLen(2)] | None = None
    """Language of the texts for the model card, an ISO 639 code such as en."""
    license: Annotated[str, MinLen(1)] | None = None
    """Licence of the model for the model card, as the Hugging Face hub writes it, such as apache-2.0."""


@dataclass(frozen=True)
class ExportFolder:
    """What `from_pretrained(path)` takes, with a model card as README.md."""

    path: Path


@dataclass(frozen=True, kw_only=True)
class Export(Stage[ExportFolder]):
    """Writes, verifies and describes the classifier.

    The evaluation is an input although only the card reads it: a card with scores is then a function of the key, and
    new scores make a new card. A rebuild costs seconds.
    """

    config: ExportConfig
    classifier: Stage[ClassifierFiles]
    labels: Stage[Labels]
    evaluation: Stage[Evaluation]

    def __post_init__(self) -> None:
        """Refuse what has no stock form before anything is trained, not after."""
        if isinstance(self.classifier, Finetune):
            _check_stock(self.classifier)

    def load(self, path: Path) -> ExportFolder:
        return ExportFolder(path)

    def run(self, ctx: Context) -> None:
        files, labels, scores = ctx.open(self.classifier), ctx.open(self.labels), ctx.open(self.evaluation).scores
        loaded = files.load()
        id2label = dict(enumerate(loaded.labels))
        write_classifier(ctx.out, loaded.model, files.path / TOKENIZER, SPECIAL, id2label)
        _read_special_tokens_as_text(ctx.out)
        texts = verification_texts(labels.split("test").texts, self.config.verify_texts, loaded.model.cfg.seq_len)
        gap = verify_export(ctx.out, loaded, texts, self.config.tolerance)
        (ctx.out / "README.md").write_text(model_card(scores, self._facts(ctx, loaded, len(texts))), encoding="utf-8")
        ctx.notes["metrics"] = {"export/logit_difference": gap}
        ctx.notes["headline"] = f"transformers gives our logits within {gap:.0e}"
        ctx.notes["model"] = {"role": "classifier"}
        ctx.notes["files"] = ["README.md"]

    def _facts(self, ctx: Context, loaded: LoadedClassifier, checked: int) -> ModelFacts:
        labelled_text = ctx.store.find(self.labels.kind, ctx.keys[self.labels.name])
        assert labelled_text is not None, "an input is built before its user"
        return ModelFacts(
            parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
            seq_len=loaded.model.cfg.seq_len,
            language=self.config.language,
            license=self.config.license,
            data_digest=labelled_text.digest,
            checked=checked,
            tolerance=self.config.tolerance,
        )


def _check_stock(classifier: Finetune) -> None:
    if classifier.config.pooling != "last":
        raise UsageError(
            f"finetune.pooling={classifier.config.pooling} has no stock Llama form, so it cannot be exported. Use last"
        )
    if classifier.model.sliding_window is not None:
        raise UsageError(
            f"model.sliding_window={classifier.model.sliding_window} has no stock Llama form, so the classifier cannot "
            "be exported. Use null"
        )


def _read_special_tokens_as_text(folder: Path) -> None:
    """Make `<|eos|>` in a text be read as it was in training: as these characters, so that nobody can forge a token."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "split_special_tokens": True}, indent=2) + "\n", encoding="utf-8")


def verification_texts(texts: Sequence[str], n_texts: int, seq_len: int) -> list[str]:
    """Texts of evenly spread lengths; one that is too long to be read whole; one that spells special tokens."""
    by_length = sorted(set(texts), key=lambda text: (len(text), text))
    places = np.linspace(0, len(by_length) - 1, min(n_texts, len(by_length))).round().astype(int)
    longest = by_length[-1]
    too_long = " ".join([longest] * (seq_len // max(len(longest.split()), 1) + 1))
    return [*(by_length[place] for place in places), too_long, f"{EOS} {by_length[0]} {PAD}"]


def verify_export(folder: Path, loaded: LoadedClassifier, texts: Sequence[str], tolerance: float) -> float:
    """The largest difference of any logit between transformers and us. Raises StageFailed if it is too large."""
    documents = tokenize(loaded.tokenizer, texts, loaded.model.cfg.seq_len)
    with torch.inference_mode(), _exact_matmul():
        ours = torch.cat([loaded.model(torch.from_numpy(document).long()[None]) for document in documents])
        batched, single = _their_logits(folder, texts, [document.tolist() for document in documents], loaded.labels)
    allowed = tolerance * max(1.0, float(ours.abs().max()))
    gaps = {"in a right-padded batch": batched - ours, "one by one": single - ours}
    for how, difference in gaps.items():
        gap = float(difference.abs().max())
        if not gap <= allowed:  # a NaN is no agreement
            raise StageFailed(
                f"the export computes other logits than the classifier: texts {how} differ by up to {gap:.2e}, more "
                f"than {allowed:.2e} (export.tolerance={tolerance:g}). Nothing was published"
            )
    return max(float(difference.abs().max()) for difference in gaps.values())


def _their_logits(
    folder: Path, texts: Sequence[str], documents: Sequence[list[int]], labels: list[str]
) -> tuple[Logits, Logits]:
    """What a stock installation makes of the folder, offline and without code from it: texts in a batch, and alone."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # seconds of import
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, **where).eval()
    _check_reading(tokenizer(list(texts), truncation=True).input_ids, documents, texts)
    named = [model.config.id2label[i] for i in range(len(labels))]
    if named != labels:
        raise StageFailed(f"the export calls its labels {named}, the classifier {labels}. Nothing was published")
    batch = tokenizer(list(texts), truncation=True, padding=True, return_tensors="pt")
    alone = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]
    return model(**batch).logits, torch.cat([model(**text).logits for text in alone])


def _check_reading(theirs: Sequence[list[int]], ours: Sequence[list[int]], texts: Sequence[str]) -> None:
    for their_ids, our_ids, text in zip(theirs, ours, texts, strict=True):
        if their_ids != our_ids:
            raise StageFailed(
                f"the export's tokenizer reads {text[:60]!r} as {their_ids[:12]}, ours as {our_ids[:12]}. Nothing was "
                "published"
            )


@contextmanager
def _exact_matmul() -> Iterator[None]:
    """Float32 products in float32, whatever training allowed itself."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
