"""What is done to every text, wherever it comes from, so that no later stage meets a surprise in it."""

import re
from collections import Counter
from collections.abc import Iterator

from blake3 import blake3
from tokenizers import pre_tokenizers

from pipeline.errors import DataError

MAX_DOCUMENT_CHARS = 1 << 20
LETTERS_SAMPLED, SPACES_SAMPLED = 64, 8
"""Characters looked at of a word or a run of spaces that is too long, evenly spread: looking at each would be slow."""


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
    refuse_binary(text, where, line)
    return text


def _invalid(data: bytes, where: str, line: int, error: UnicodeDecodeError) -> str:
    newline = b"\n"
    line += data.count(newline, 0, error.start)
    byte = error.start - data.rfind(newline, 0, error.start)
    remedy = "Convert the file to UTF-8, or set invalid_utf8: repair"
    return f"{where}:{line}:{byte}: invalid UTF-8 byte 0x{data[error.start]:02x}. {remedy}"


def refuse_binary(text: str, where: str, line: int) -> None:
    """Raises DataError if there is a NUL character in the text."""
    at = text.find("\0")
    if at >= 0:
        line += text.count("\n", 0, at)
        raise DataError(f"{where}:{line}: a NUL character: this is binary, or UTF-16. Give UTF-8 text")


def normalise(text: str) -> str:
    """Line ends as `\\n`, whatever the system they come from."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def cut(text: str, limit: int = MAX_DOCUMENT_CHARS) -> Iterator[str]:
    """A text in pieces of at most `limit` characters, cut after a space where there is one in the second half."""
    start = 0
    while len(text) - start > limit:
        space = max(text.rfind(" ", start, start + limit), text.rfind("\n", start, start + limit)) + 1
        stop = space if space > start + limit // 2 else start + limit
        yield text[start:stop]
        start = stop
    yield text[start:] if start else text


def split_long_words(text: str, max_bytes: int) -> tuple[str, int]:
    """The text with longer words broken by spaces and longer runs of spaces shortened; and how many there were.

    A word is what the byte-level pre-tokenizer takes for one: training a BPE is quadratic in its length, so that one
    megabyte without a space would never end.
    """
    if not _may_be_long(text, max_bytes // 4):  # a character has at most four bytes
        return text, 0
    pieces: list[str] = []
    found = end = 0
    for _, (start, stop) in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text):
        word = text[start:stop]
        if 4 * len(word) > max_bytes and len(word.encode()) > max_bytes:
            pieces += [text[end:start], _break(word, max_bytes)]
            found, end = found + 1, stop
    return "".join([*pieces, text[end:]]), found


def _may_be_long(text: str, chars: int) -> bool:
    """Whether a word or a run of spaces could have so many characters; hardly ever true of a text that has none."""
    if len(text) < chars:
        return False
    letters, spaces = (min(sampled, chars) for sampled in (LETTERS_SAMPLED, SPACES_SAMPLED))
    words = text[:: chars // letters].replace("\n", " ").split(" ")
    if max(map(len, words)) >= letters:
        return True
    return re.search(rf"\s{{{spaces}}}", text[:: chars // spaces]) is not None


def _break(word: str, max_bytes: int) -> str:
    step = max(1, max_bytes // 4)
    if word.isspace():
        return word[:step]
    return " ".join(word[i : i + step] for i in range(0, len(word), step))


def unit_hash(text: str, purpose: str) -> float:
    """A number in [0, 1) that is the same for equal texts and independent between purposes."""
    digest = blake3(f"{purpose}\0{text}".encode()).digest(length=8)
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
