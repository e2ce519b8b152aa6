"""Many texts to token ids, by the fastest engine whose ids are those of `tokenizers`, which stays the judge."""

import importlib.util
import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from jaxtyping import Int64, UInt32
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase

from pipeline.tokens import encode_documents, load_tokenizer, special_ids

log = logging.getLogger("gristmill")

JUDGED_CHARS = 1 << 16
"""So much of a corpus both engines encode at least."""
JUDGED_SHARE = 1 / 256
"""As large a part of the texts that come together both encode at least, in pieces from all over them."""
PIECE_CHARS = 256
"""As much of one text is judged at least, where it is as long."""
FAST, REFERENCE = "gigatoken", "tokenizers"


@dataclass(frozen=True, eq=False)
class Encoded:
    """Documents one after the other, each between its special tokens."""

    ids: UInt32[np.ndarray, " n_tokens"]
    lengths: Int64[np.ndarray, " n_documents"]


Encode = Callable[[Sequence[str]], Encoded]
"""The documents of some texts, in their order. No text can forge a special token."""


class Disagreement(Exception):
    """The fast engine has other ids than the reference for some text."""


def checked(fast: Encode, reference: Encode, least_chars: int, texts: Sequence[str]) -> Encoded:
    """What the fast engine makes of some texts. Raises Disagreement where the reference makes something else of them.

    It is asked about pieces of them: `least_chars` characters, or JUDGED_SHARE of all where that is more.
    """
    sample = _sample(texts, max(least_chars, int(JUDGED_SHARE * sum(map(len, texts)))))
    ours, theirs = reference(sample), fast(sample)
    if not (np.array_equal(ours.lengths, theirs.lengths) and np.array_equal(ours.ids, theirs.ids)):
        raise Disagreement
    return fast(texts)


def _sample(texts: Sequence[str], limit: int) -> list[str]:
    """About `limit` characters of texts from all over the batch: the beginning of each of some of them."""
    mean = sum(map(len, texts)) // max(1, len(texts))
    n = min(len(texts), max(1, limit // min(PIECE_CHARS, max(1, mean))))
    length = max(PIECE_CHARS, limit // max(1, n))
    return [texts[i * len(texts) // n][:length] for i in range(n)]


def _by_reference(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    documents = encode_documents(tokenizer, texts)
    lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
    return Encoded(np.concatenate([*documents, np.empty(0, np.int32)]).astype(np.uint32), lengths)


@lru_cache(maxsize=1)
def _loaded(file: Path) -> Tokenizer:
    """As below, a process that encodes shard after shard loads the file once."""
    return load_tokenizer(file)


def reference_engine(file: Path) -> Encode:
    """`tokenizers` itself."""
    return partial(_by_reference, _loaded(file))


@lru_cache(maxsize=1)
def fast_engine(file: Path) -> Encode | None:
    """The fast engine, or None, which is logged, where it is not installed or does not know a part of this file."""
    if importlib.util.find_spec(FAST) is None:
        log.info("texts are encoded by %s: %s is not installed; `pip install gristmill[fast]` adds it", REFERENCE, FAST)
        return None
    import awkward  # noqa: F401 - it would import this later and take a request to stop, met there, for its absence
    from gigatoken import Tokenizer as FastTokenizer

    spec = orjson.loads(file.read_bytes())
    if any(not token["special"] for token in spec.get("added_tokens", [])):  # these are found in texts, and rarely
        log.info("texts are encoded by %s: this tokenizer has added tokens that texts may hold", REFERENCE)
        return None
    prepare = _taken_over(spec)
    try:
        backend = FastTokenizer.from_json(orjson.dumps(spec).decode()).backend
    except (RuntimeError, ValueError) as error:
        log.info("texts are encoded by %s: %s cannot read this tokenizer: %s", REFERENCE, FAST, error)
        return None
    ids = special_ids(_loaded(file))
    return partial(_by_fast, backend, prepare, ids.bos, ids.eos)


def _taken_over(spec: dict[str, Any]) -> Callable[[str], str]:
    """Takes out of a `tokenizer.json`, in place, what is done here instead: returns it, to be done to each text.

    Special tokens go too, as no text may spell them.
    """
    spec["added_tokens"], spec["post_processor"] = [], None
    lower = (spec.get("normalizer") or {}).get("type") == "Lowercase"
    if lower:
        spec["normalizer"] = None
    splits = spec.get("pre_tokenizer") or {}
    space = splits.get("type") == "ByteLevel" and splits.get("add_prefix_space", False)
    if space:
        splits["add_prefix_space"] = False
    return partial(prepared, lower, space)


def prepared(lower: bool, space: bool, text: str) -> str:
    """A text as the byte-level pre-tokenizer sees it: in lower case, and with a space before its first word."""
    if lower:  # character by character, as tokenizers does; Python has another small sigma for the end of a word
        text = text.replace("\u03a3", "\u03c3").lower()
        if not text.isascii():
            for capital, small in _newer_capitals():
                text = text.replace(capital, small)
    return f" {text}" if space and text and text[0] != " " else text


@cache
def _newer_capitals() -> list[tuple[str, str]]:
    """The capitals of which tokenizers knows the small letter and Python, whose Unicode may be older, knows nothing.

    Every script that has capitals is in the first two planes.
    """
    unknown = [character for character in map(chr, range(0x80, 0x20000)) if unicodedata.category(character) == "Cn"]
    lowered = Lowercase().normalize_str("\n".join(unknown)).split("\n")
    return [(capital, small) for capital, small in zip(unknown, lowered, strict=True) if capital != small]


def _by_fast(backend: Any, prepare: Callable[[str], str], bos: int, eos: int, texts: Sequence[str]) -> Encoded:
    """In this thread: shards are encoded side by side in processes of their own."""
    rows = backend.encode_batch([prepare(text) for text in texts], parallel=False).layout
    offsets, content = np.asarray(rows.offsets.data, dtype=np.int64), np.asarray(rows.content.data)
    first = offsets[:-1] + 2 * np.arange(len(texts))
    lengths = np.diff(offsets) + 2
    ids = np.empty(offsets[-1] - offsets[0] + 2 * len(texts), dtype=np.uint32)
    inside = np.ones(len(ids), dtype=bool)
    for places, special in ((first, bos), (first + lengths - 1, eos)):
        ids[places], inside[places] = special, False
    ids[inside] = content[offsets[0] : offsets[-1]]
    return Encoded(ids, lengths)
