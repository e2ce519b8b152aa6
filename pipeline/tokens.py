"""The one way that text becomes token ids: special tokens around each document, and none that a text could forge."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pipeline.errors import StageFailed

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SPECIAL_IDS = BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
SPECIAL = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}


def load_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, set to read special tokens in a text as ordinary characters."""
    with panics(f"{file} cannot be loaded"):
        tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text between bos and eos, int32. No text can forge a special token: `<|eos|>` in it is text."""
    tokenizer.encode_special_tokens = True  # a setting that tokenizer.json does not keep
    with panics("these texts cannot be encoded"):
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


@contextmanager
def panics(what: str) -> Iterator[None]:
    """Turns a panic of tokenizers, which is no Exception, into StageFailed."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the type cannot be imported
            raise
        raise StageFailed(f"{what}: tokenizers stopped with: {error}") from error
