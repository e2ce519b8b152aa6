"""The one way that text becomes token ids: special tokens around each document, and none that a text could forge."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from pipeline.errors import DataError, StageFailed

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
BOS_ID, EOS_ID = 0, 1
"""Those of a tokenizer of our own."""
PADS = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<unk>", "[UNK]")
"""What is taken for padding, the first that there is."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What says how a tokenizer of others reads: itself, and its special tokens by their roles."""

PARALLELISM = "TOKENIZERS_PARALLELISM"
"""What tokenizers reads before each batch."""


@dataclass(frozen=True)
class SpecialIds:
    """The tokens that no text can spell: before a text, after it, and where there is none."""

    bos: int
    eos: int
    pad: int


def special_ids(tokenizer: Tokenizer) -> SpecialIds:
    """Those of any tokenizer that puts a token before and one after a text.

    A tokenizer of others may have none for padding. Then any will do that does not end a text: what is padding is said
    by document ids here, and a stock classifier looks for the last token that is none.
    """
    bos, eos = tokenizer.encode("").ids
    known = [tokenizer.token_to_id(token) for token in PADS]
    return SpecialIds(bos, eos, next(number for number in (*known, bos, 0, 1) if number is not None and number != eos))


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """`special_ids` as tokens, by the roles that transformers has for them."""
    ids = special_ids(tokenizer)
    return {f"{role}_token": str(tokenizer.id_to_token(getattr(ids, role))) for role in ("bos", "eos", "pad")}


def load_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, set to read special tokens in a text as ordinary characters.

    Raises DataError for a file that is missing or damaged.
    """
    with panics(f"{file} cannot be loaded"):
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise DataError(f"{file}: no tokenizer that can be read: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def import_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model of others, made to put a first and a last token around every text and to cut none.

    Those of public models put the first at most. Raises DataError where no token is known to end a text.
    """
    tokenizer = load_tokenizer(folder / TOKENIZER_FILES[0])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    bos, eos = _ends(folder, tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(token, tokenizer.token_to_id(token)) for token in {bos, eos}]
    )
    return tokenizer


def _ends(folder: Path, tokenizer: Tokenizer) -> tuple[str, str]:
    """The tokens to put before and after a text, as files beside the tokenizer name them, or as it puts them itself.

    Where none begins a text, the one that ends it does.
    """
    named: dict[str, Any] = {}
    for file in TOKENIZER_FILES[1:]:
        if (path := folder / file).exists():
            named |= _object(path)
    bos, eos = (_content(named.get(role), f"{folder}: its {role}") for role in ("bos_token", "eos_token"))
    if eos and tokenizer.token_to_id(eos) is not None:
        return (bos if bos and tokenizer.token_to_id(bos) is not None else eos), eos
    if len(tokenizer.encode("").ids) != 2:
        raise DataError(f"{folder}: its tokenizer_config.json names no eos_token that tokenizer.json has")
    known = special_tokens(tokenizer)
    return known["bos_token"], known["eos_token"]


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: no JSON object")
    return found


def _content(token: Any, which: str) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    if token is None or isinstance(content, str):
        return content
    raise DataError(f"{which} is {token!r:.60}. Write the token itself, or an object with its `content`")


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text between bos and eos, int32. No text can forge a special token: `<|eos|>` in it is text."""
    tokenizer.encode_special_tokens = True  # a setting that tokenizer.json does not keep
    with panics("these texts cannot be encoded"):
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
    return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps tokenizers to the thread that calls it, where other processes work on the other cores."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        del os.environ[PARALLELISM]
        if before is not None:
            os.environ[PARALLELISM] = before


@contextmanager
def panics(what: str) -> Iterator[None]:
    """Turns a panic of tokenizers, which is no Exception, into StageFailed."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the type cannot be imported
            raise
        raise StageFailed(f"{what}: tokenizers stopped with: {error}") from error
