"""What is done to every text, wherever it comes from, so that no later stage meets a surprise in it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from blake3 import blake3
from jaxtyping import Bool, Float64, UInt8
from tokenizers import pre_tokenizers

from pipeline.errors import DataError

MAX_DOCUMENT_CHARS = 1 << 20
REPLACEMENT = "\ufffd"
"""What stands for what cannot be a character of a text."""
LETTERS_SAMPLED, SPACES_SAMPLED = 32, 8
"""Characters looked at of a word or a run of spaces that is too long, evenly spread: looking at each would be slow."""
BYTES_APART = 8
"""One in so many bytes of a block is looked at first: in most blocks they show that nothing in it is too long."""


def decode(data: bytes, where: str, line: int, *, repair: bool, counts: "Counter[str]") -> str:
    """UTF-8 bytes as text. `line` is the line that `data` starts on.

    With `repair`, invalid bytes become U+FFFD and `counts["repaired"]` goes up. Raises DataError with file:line:byte.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if not repair:
            raise DataError(_invalid(data, where, line, error)) from error
        counts["repaired"] += 1
        text = data.decode("utf-8", errors="replace")
    return text


def _invalid(data: bytes, where: str, line: int, error: UnicodeDecodeError) -> str:
    newline = b"\n"
    line += data.count(newline, 0, error.start)
    byte = error.start - data.rfind(newline, 0, error.start)
    remedy = "Convert the file to UTF-8, or, for the corpus or the labels of a run, set invalid_utf8: repair"
    return f"{where}:{line}:{byte}: invalid UTF-8 byte 0x{data[error.start]:02x}. {remedy}"


def refuse_binary(text: str, where: str, line: int) -> None:
    """Raises DataError if there is a NUL character in what a file of text holds as it stands."""
    at = text.find("\0")
    if at >= 0:
        line += text.count("\n", 0, at)
        raise DataError(f"{where}:{line}: a NUL character: this is binary, or UTF-16. Give UTF-8 text")


def normalise(text: str, counts: "Counter[str] | None" = None) -> str:
    """Line ends as `\\n`, whatever the system they come from; a NUL, which a record may spell out, as U+FFFD.

    `counts["texts_with_nul"]` goes up for a text that held any.
    """
    if "\0" in text:
        text = text.replace("\0", REPLACEMENT)
        if counts is not None:
            counts["texts_with_nul"] += 1
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def cut(text: str, limit: int = MAX_DOCUMENT_CHARS) -> list[str]:
    """A text in pieces of at most `limit` characters, cut after a space where there is one in the second half."""
    return list(_pieces(text, limit)) if len(text) > limit else [text]


def _pieces(text: str, limit: int) -> Iterator[str]:
    start = 0
    while len(text) - start > limit:
        space = max(text.rfind(" ", start, start + limit), text.rfind("\n", start, start + limit)) + 1
        stop = space if space > start + limit // 2 else start + limit
        yield text[start:stop]
        start = stop
    yield text[start:]


def batches(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
    """Texts in order, in lists of at most so many characters, or of one text."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if size + len(text) > chars and batch:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def split_long_words(text: str, max_bytes: int) -> tuple[str, int]:
    """The text with longer words broken by spaces and longer runs of spaces shortened; and how many there were.

    A word is what the byte-level pre-tokenizer takes for one: training a BPE is quadratic in its length, so that one
    megabyte without a space would never end. Only the stretches that could hold such a word are given to it.
    """
    pieces: list[str] = []
    found = end = 0
    for first, last in _suspects(text, max_bytes // 4):  # a character has at most four bytes
        for _, span in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text[first:last]):
            start, stop = (first + offset for offset in span)
            word = text[start:stop]
            if 4 * len(word) > max_bytes and len(word.encode()) > max_bytes:
                pieces += [text[end:start], _break(word, max_bytes)]
                found, end = found + 1, stop
    return "".join([*pieces, text[end:]]) if found else text, found


def split_long_words_of(texts: list[str], max_bytes: int) -> tuple[list[str], int]:
    """As `split_long_words`, for each of some texts. They are looked at all together, since few texts hold any."""
    if not _may_hold_long_words("\n".join(texts), max_bytes // 4):
        return texts, 0
    split = [split_long_words(text, max_bytes) for text in texts]
    return [text for text, _ in split], sum(found for _, found in split)


def _may_hold_long_words(text: str, chars: int) -> bool:
    """False only where `_suspects` finds nothing.

    Bytes are looked at, of which a word has no fewer than characters. A run of so many without a space or line end,
    or without a visible character of ASCII, fills a whole block of half as many.
    """
    data, half = np.frombuffer(text.encode(), np.uint8), (chars + 1) // 2
    blocks = data[: len(data) // half * half].reshape(-1, half)
    unclear = blocks[~_mixed(np.ascontiguousarray(blocks[:, ::BYTES_APART]))]
    return not _mixed(unclear).all()


def _mixed(blocks: UInt8[np.ndarray, "n bytes"]) -> Bool[np.ndarray, " n"]:
    """Whether a block has both a space or line end and a visible character of ASCII."""
    between = (blocks == ord(" ")) | (blocks == ord("\n"))
    visible = blocks - np.uint8(ord("!")) <= ord("~") - ord("!")
    return between.any(axis=1) & visible.any(axis=1)


def _suspects(text: str, chars: int) -> list[tuple[int, int]]:
    """Where words or runs of spaces of at least so many characters could be, in order and apart from each other.

    No word crosses the end of a stretch: to the left of each is a space or a line end, which is what tells words apart,
    and to the right of a run of spaces one character more, which says how far it goes.
    """
    if len(text) < chars:
        return []
    words = ((max(start - 1, 0), stop) for start, stop in _long_runs(text, r"[^ \n]", chars, LETTERS_SAMPLED))
    spaces = ((start, stop + 1) for start, stop in _long_runs(text, r"\s", chars, SPACES_SAMPLED))
    apart: list[tuple[int, int]] = []
    for start, stop in sorted([*words, *spaces]):
        if apart and start < apart[-1][1]:
            start, stop = apart[-1][0], max(apart.pop()[1], stop)
        apart.append((start, stop))
    return apart


def _long_runs(text: str, kind: str, chars: int, sampled: int) -> Iterator[tuple[int, int]]:
    """Every longest run of at least so many characters of a kind, found by looking at some that are evenly spread."""
    few = min(sampled, chars)
    step = chars // few
    for stretch in re.finditer(f"(?<!{kind}){kind}{{{few},}}", text[::step]):  # tried once a stretch: twice as fast
        first = max(stretch.start() - 1, 0) * step  # the character before is of another kind, and so is the one after
        for run in re.finditer(f"{kind}{{{chars},}}", text[first : stretch.end() * step + 1]):
            yield first + run.start(), first + run.end()


def _break(word: str, max_bytes: int) -> str:
    step = max(1, max_bytes // 4)
    if word.isspace():
        return word[:step]
    return " ".join(word[i : i + step] for i in range(0, len(word), step))


def unit_hashes(texts: Iterable[str], purpose: str) -> Float64[np.ndarray, " n"]:
    """A number in [0, 1) for each text that is the same for equal texts and independent between purposes."""
    salt = f"{purpose}\0".encode()
    digests = b"".join([blake3(salt + text.encode()).digest(length=8) for text in texts])
    return (np.frombuffer(digests, ">u8") >> 11) / (1 << 53)


def unit_hash(text: str, purpose: str) -> float:
    """That of one text."""
    return float(unit_hashes([text], purpose)[0])
