"""A small classifier with a tokenizer that can write any text, ready to be exported."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers, trainers
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder
from model.heads import Classifier
from model.init import initialize
from model.ngrams import NGrams
from pipeline.bpe import blank_tokenizer
from pipeline.export import Subject, calibrated
from pipeline.spelling import spelled
from pipeline.tokens import BOS, EOS, PAD, load_tokenizer
from pipeline.weights import ClassifierFiles, LoadedClassifier, write_classifier
from pipeline.windows import ONE_WINDOW, Windows

LABELS = ["calm", "angry é", "<b>"]
WORDS = ["the cat sat on the mat", "a dog ran over the hill and far away", "why is it so"]


def classifier_folder(
    folder: Path,
    *,
    pooling: str = "last",
    seed: int = 0,
    windows: Windows = ONE_WINDOW,
    multi_label: bool = False,
    ngrams: int = 0,
    **shape: Any,
) -> Path:
    """A classifier artifact: weights, and n-grams if any, large enough for the logits to depend on what is read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = blank_tokenizer(lowercase=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[BOS, EOS, PAD], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    tokenizer.save(str(folder / "trained.json"))
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_ff": 48, "seq_len": 24} | shape
    cfg = ModelConfig(vocab_size=tokenizer.get_vocab_size() + 1, **sizes)
    model = Classifier(Decoder(cfg), len(LABELS), pooling)
    initialize(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    model.ngrams = some_ngrams(ngrams, spelled(tokenizer, cfg.vocab_size)) if ngrams else None
    params, trained = dict(model.named_parameters()), folder / "trained.json"
    write_classifier(
        folder, params, cfg, LABELS, pooling, trained, windows, multi_label=multi_label, ngrams=model.ngrams
    )
    (folder / "trained.json").unlink()
    return folder


def some_ngrams(order: int, spelling: Tensor) -> NGrams:
    ngrams = NGrams(len(LABELS), order, 101, spelling, n_bytes=3)
    with torch.no_grad():
        for bag in ngrams.bags:
            bag.table.normal_(generator=torch.Generator().manual_seed(bag.lengths[-1]))
        ngrams.blend.by.copy_(torch.tensor([[0.9, 0.6], [0.2, 1.1]]))
        ngrams.blend.share.fill_(0.7)
    return ngrams


def subject_of(folder: Path, temperature: float) -> tuple[Subject, LoadedClassifier]:
    """What is exported from a classifier artifact, and the classifier as it was before calibration."""
    loaded = ClassifierFiles(folder).load()
    assert load_tokenizer(folder / "tokenizer.json").get_vocab_size() < loaded.model.cfg.vocab_size
    return calibrated(loaded, folder / "tokenizer.json", temperature), loaded
