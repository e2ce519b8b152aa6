"""What an export must reproduce: our own logits, on texts that show every way in which reading can differ."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from tokenizers import Tokenizer
from torch import Tensor

from pipeline.classify import tokenize
from pipeline.errors import StageFailed
from pipeline.tokens import EOS, PAD
from pipeline.weights import LoadedClassifier

Logits = Float32[Tensor, "texts labels"]

NO_TEXT = "\N{REPLACEMENT CHARACTER}"
"""What a token decodes to that is a part of a character."""

CHARS_PER_TOKEN = 16
"""So many characters for each token that is read are a text that is too long, whatever it says."""

PADDED, ALONE = "in a right-padded batch", "one by one"
"""How texts are given to a program."""


@dataclass(frozen=True, eq=False)
class Expected:
    """Texts, their token ids, the names of the labels, and the logits that an export must give for them."""

    texts: list[str]
    documents: list[list[int]]
    labels: list[str]
    logits: Logits


def expected(loaded: LoadedClassifier, texts: Sequence[str], temperature: float = 1.0) -> Expected:
    """Our logits over the temperature, in float32, each text by itself, cut to one window: what a program computes.

    A classifier that reads several averages such logits outside of the network.
    """
    model = loaded.model.float().cpu()
    documents = tokenize(loaded.tokenizer, texts, model.cfg.seq_len)
    with torch.inference_mode(), _exact_matmul():
        ours = torch.cat([model(torch.from_numpy(document).long()[None]) for document in documents])
    return Expected(list(texts), [document.tolist() for document in documents], loaded.labels, ours / temperature)


def compare(program: str, theirs: Mapping[str, Logits], wanted: Expected, tolerance: float) -> float:
    """The largest difference of any logit. Raises StageFailed if it is too large."""
    allowed = tolerance * max(1.0, float(wanted.logits.abs().max()))
    gaps = {how: float((logits - wanted.logits).abs().max()) for how, logits in theirs.items()}
    for how, gap in gaps.items():
        if not gap <= allowed:  # a NaN is no agreement
            raise StageFailed(
                f"{program} computes other logits from the export than the classifier: texts {how} differ by up to "
                f"{gap:.2e}, more than {allowed:.2e} (export.tolerance={tolerance:g}). Nothing was published"
            )
    return max(gaps.values())


def check_reading(program: str, theirs: Sequence[list[int]], wanted: Expected) -> None:
    """Raises StageFailed where a program reads a text as other tokens than we do."""
    for their_ids, our_ids, text in zip(theirs, wanted.documents, wanted.texts, strict=True):
        if their_ids != our_ids:
            raise StageFailed(
                f"{program} reads {text[:60]!r} as {their_ids[:12]}, we as {our_ids[:12]}. Nothing was published"
            )


def check_labels(theirs: Sequence[str], wanted: Expected) -> None:
    """Raises StageFailed where an export names its labels otherwise."""
    if list(theirs) != wanted.labels:
        raise StageFailed(
            f"the export calls its labels {theirs}, the classifier {wanted.labels}. Nothing was published"
        )


def padded(documents: Sequence[Sequence[int]], padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, int64 [documents, longest], padding on the right."""
    longest = max(map(len, documents))
    ids = [[*document, *[padding] * (longest - len(document))] for document in documents]
    mask = [[1] * len(document) + [0] * (longest - len(document)) for document in documents]
    return np.array(ids, dtype=np.int64), np.array(mask, dtype=np.int64)


def verification_texts(texts: Sequence[str], n_texts: int, seq_len: int) -> list[str]:
    """Texts of evenly spread lengths; one that is too long to be read whole; one that spells special tokens.

    Each has so many characters at most: memory for more of one without blanks is not to be had.
    """
    by_length = sorted({text[: CHARS_PER_TOKEN * seq_len] for text in texts}, key=lambda text: (len(text), text))
    places = np.linspace(0, len(by_length) - 1, min(n_texts, len(by_length))).round().astype(int)
    longest = by_length[-1]
    too_long = " ".join([longest] * (CHARS_PER_TOKEN * seq_len // (len(longest) + 1) + 1))
    return [*(by_length[place] for place in places), too_long, f"{EOS} {by_length[0]} {PAD}"]


def vocabulary_texts(tokenizer: Tokenizer, n_texts: int, seq_len: int) -> list[str]:
    """As `verification_texts` where no data is at hand: words out of the vocabulary itself, each time the same."""
    pieces = [tokenizer.decode([number]) for number in range(tokenizer.get_vocab_size())]
    words = [piece for piece in pieces if piece.strip() and piece.isprintable() and NO_TEXT not in piece]
    draw, lengths = np.random.default_rng(0), np.linspace(1, seq_len, n_texts).round().astype(int)
    return verification_texts(["".join(draw.choice(words, length)) for length in lengths], n_texts, seq_len)


@contextmanager
def _exact_matmul() -> Iterator[None]:
    """Float32 products in float32, whatever training allowed itself."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
