"""A stock Hugging Face folder: LlamaForSequenceClassification, which needs no code but transformers."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.interchange import write_classifier
from pipeline.export import Subject
from pipeline.export._verify import ALONE, PADDED, Expected, Logits, check_labels, check_reading
from pipeline.tokens import special_tokens

PROGRAM = "transformers"
PACKAGES = ()


def refusal(cfg: ModelConfig, pooling: str, *, ngrams: bool = False) -> str | None:
    """The setting that a stock Llama classifier, which reads one way and answers at the last token, lacks."""
    if ngrams:
        return "ngrams have no stock Llama form (null has)"
    if pooling != "last":
        return f"finetune.pooling={pooling} has no stock Llama form (last has)"
    if cfg.sliding_window is not None:
        return f"model.sliding_window={cfg.sliding_window} has no stock Llama form (null has)"
    if not cfg.causal:
        return "a body that reads both ways (finetune.bidirectional, pretrain.objective) has no stock Llama form"
    return None


def write(folder: Path, subject: Subject) -> None:
    id2label = dict(enumerate(subject.loaded.labels))
    special = special_tokens(subject.loaded.tokenizer)
    notes = subject.loaded.windows.record
    write_classifier(
        folder, subject.loaded.model, subject.tokenizer, special, id2label, temperature=subject.temperature, notes=notes
    )
    _read_special_tokens_as_text(folder)


def _read_special_tokens_as_text(folder: Path) -> None:
    """Make `<|eos|>` in a text be read as it was in training: as these characters, so that nobody can forge a token."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "split_special_tokens": True}, indent=2) + "\n", encoding="utf-8")


def logits(folder: Path, expected: Expected) -> Mapping[str, Logits]:
    """What a stock installation makes of the folder, offline and without code from it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer  # seconds of import
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **where)
    model = AutoModelForSequenceClassification.from_pretrained(folder, use_safetensors=True, **where).eval()
    texts = expected.texts
    check_reading(PROGRAM, tokenizer(texts, truncation=True).input_ids, expected)
    check_labels([model.config.id2label[i] for i in range(model.config.num_labels)], expected)
    batch = tokenizer(texts, truncation=True, padding=True, return_tensors="pt")
    alone = [tokenizer(text, truncation=True, return_tensors="pt") for text in texts]
    with torch.inference_mode():
        return {PADDED: model(**batch).logits, ALONE: torch.cat([model(**text).logits for text in alone])}
