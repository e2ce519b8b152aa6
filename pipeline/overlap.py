"""Which texts occur elsewhere, word for word or nearly: n-gram containment, streamed, linear in the bytes read.

A text counts as found where at least ENOUGH of its word n-grams occur in the other texts. N is 8: of runs of five
words, 1 to 4 % of those of film reviews and glosses stood by chance in 150 MB of other English, of runs of eight at
most 1 %, copies included; and runs of thirteen, as for web pages (Brown et al. 2020, appendix C), pass over most
sentences. A text of fewer words is one n-gram itself: it is found only as a whole. One of fewer than SHORTEST words
says nothing, and is not checked.

Words are runs of letters, digits and marks, in lower case; each character of Chinese or Japanese is a word. They are
hashed as polynomials modulo 2^64, all of a chunk at once: the value of a word is a difference of two prefix sums.
Among the 2^64 values a false match is less likely than a damaged disk.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8, UInt64

from pipeline.text import batches

N = 8
SHORTEST = 5
ENOUGH = 0.8
NEW = 0.1
"""A text is new where less than this share of its n-grams occurs elsewhere: a quotation is no copy, and not new."""
CHUNK_CHARS = 1 << 20
EXCERPT_CHARS = 240

SEPARATOR = "\0"
"""Between documents. No text has it: one that spells it out is read with U+FFFD in its place."""

Hashes = UInt64[np.ndarray, " hashes"]
Numbers = Int64[np.ndarray, " hashes"]

_BASE = np.uint64(0x9E3779B97F4A7C15)
_WORD = np.uint64(0xC2B2AE3D27D4EB4F)
_MIX = np.uint64(0xD6E8FEB86659FD93)
_NOTHING, _PART, _WHOLE = range(3)
_ALONE = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF))
"""Kana and ideographs of the first plane; what lies beyond it counts as a word a character too."""


@dataclass(frozen=True)
class Overlap:
    """For each text: which share of its n-grams occurs elsewhere, and the number of the document with most of them.

    `coverage` is NaN for a text that is too short to be checked. `source` is -1 where nothing was found; an n-gram
    counts for the first document that has it.
    """

    coverage: Float[np.ndarray, " texts"]
    source: Int64[np.ndarray, " texts"]

    @property
    def checked(self) -> Bool[np.ndarray, " texts"]:
        return ~np.isnan(self.coverage)

    @property
    def found(self) -> Bool[np.ndarray, " texts"]:
        return np.nan_to_num(self.coverage) >= ENOUGH

    @property
    def new(self) -> Bool[np.ndarray, " texts"]:
        """Those that say something else than the documents; one that is too short to be checked does."""
        return np.nan_to_num(self.coverage) < NEW


@dataclass(frozen=True)
class _Words:
    """The words of some documents in a row: their hashes, and the number of the document each stands in."""

    hashes: Hashes
    documents: Numbers

    def ngrams(self, sizes: Collection[int]) -> "Iterator[tuple[int, Hashes, Numbers]]":
        """For each size, the n-grams that stay in one document, and the places of their first words."""
        grams = self.hashes
        for size in range(1, max(sizes) + 1):
            if size > 1:
                grams = grams[:-1] * _WORD + self.hashes[size - 1 :]
            if size in sizes:
                whole = np.flatnonzero(self.documents[: len(grams)] == self.documents[size - 1 :])
                yield size, grams[whole], whole


@dataclass(frozen=True)
class _Probe:
    """What is looked for: distinct hashes, sorted; the sizes they have; and a table that rules most others out."""

    known: Hashes
    sizes: frozenset[int]
    maybe: Bool[np.ndarray, " slots"]

    def hits(self, grams: Hashes) -> tuple[Numbers, Numbers]:
        """Places in `grams` of those that are known, and their places in `known`."""
        near = np.flatnonzero(self.maybe[_slot(grams, len(self.maybe))])
        at = np.searchsorted(self.known, grams[near])
        same = self.known[np.minimum(at, len(self.known) - 1)] == grams[near]
        return near[same], at[same]


def overlap(
    texts: Sequence[str],
    documents: Iterable[str],
    *,
    n: int = N,
    on_progress: Callable[[int], None] | None = None,
) -> Overlap:
    """Look for `texts` in `documents`, which are read once. `on_progress` gets the number of documents read.

    Memory: about 60 bytes for each n-gram of `texts`, and a chunk of documents. The work is linear in the documents.
    """
    fingerprints = _fingerprints(texts, n)
    hashes, owners = (np.concatenate([getattr(f, field) for f in fingerprints]) for field in ("hashes", "owners"))
    known, place = np.unique(hashes, return_inverse=True)
    first_in = np.full(len(known), -1, dtype=np.int64)
    probe = _Probe(known, frozenset(f.size for f in fingerprints if len(f.hashes)), _table(known))
    done = 0
    for chunk in batches(documents, CHUNK_CHARS) if probe.sizes else ():
        _mark(first_in, probe, _words(chunk), done)
        done += len(chunk)
        if on_progress:
            on_progress(done)
    return _summed(first_in[place], owners, len(texts))


def _summed(first_in: Numbers, owners: Numbers, n_texts: int) -> Overlap:
    found = first_in >= 0
    grams, hits = (np.bincount(rows, minlength=n_texts) for rows in (owners, owners[found]))
    coverage = np.where(grams > 0, hits / np.maximum(grams, 1), np.nan)
    source = np.full(n_texts, -1, dtype=np.int64)
    (owner, document), counts = np.unique(np.stack([owners[found], first_in[found]]), axis=1, return_counts=True)
    order = np.lexsort((-document, counts))  # the last one written stands: of those with most n-grams the first
    source[owner[order]] = document[order]
    return Overlap(coverage, source)


def _mark(first_in: Numbers, probe: _Probe, words: _Words, done: int) -> None:
    """Note for each known n-gram of a chunk the first document that has it."""
    for _, grams, first in words.ngrams(probe.sizes):
        at, place = probe.hits(grams)
        at, place = at[::-1], place[::-1]  # the last one written stands, and it has to be the first document
        new = first_in[place] < 0
        first_in[place[new]] = done + words.documents[first[at[new]]]


@dataclass(frozen=True)
class _Fingerprints:
    """The n-grams of one size that texts are looked for by, and the number of the text that each is of."""

    size: int
    hashes: Hashes
    owners: Numbers


def _fingerprints(texts: Sequence[str], n: int) -> list[_Fingerprints]:
    """The n-grams of the texts; of a text of fewer words, the whole."""
    found = [_Fingerprints(n, np.empty(0, np.uint64), np.empty(0, np.int64))]
    done = 0
    for chunk in batches(texts, CHUNK_CHARS):
        words = _words(chunk)
        n_words = np.bincount(words.documents, minlength=len(chunk))
        for size, grams, first in words.ngrams(range(min(SHORTEST, n), n + 1)):
            owners = words.documents[first]
            wanted = n_words[owners] >= n if size == n else n_words[owners] == size
            found.append(_Fingerprints(size, grams[wanted], owners[wanted] + done))
        done += len(chunk)
    return found


def _table(known: Hashes) -> Bool[np.ndarray, " slots"]:
    """Whether any known hash falls into a slot; 16 slots a hash, between 2^16 and 2^27."""
    table = np.zeros(1 << min(max((16 * len(known)).bit_length(), 16), 27), dtype=bool)
    table[_slot(known, len(table))] = True
    return table


def _slot(hashes: Hashes, slots: int) -> Hashes:
    return hashes >> np.uint64(64 - (slots.bit_length() - 1))


def _words(documents: Sequence[str]) -> _Words:
    """The words of some documents, hashed."""
    text = SEPARATOR.join(documents).lower() + SEPARATOR
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    starts, ends = _bounds(_kinds()[np.minimum(codes, 0xFFFF)])
    powers, inverses = _powers(1 << int(len(codes) - 1).bit_length())
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(codes * powers[: len(codes)], out=sums[1:])
    hashes = _mixed((sums[ends] - sums[starts]) * inverses[starts])
    return _Words(hashes, np.searchsorted(np.flatnonzero(codes == ord(SEPARATOR)), starts))


def _bounds(kinds: UInt8[np.ndarray, " chars"]) -> tuple[Numbers, Numbers]:
    """Where words start, and the places after their ends. The last character is none of a word."""
    before = np.concatenate([np.array([_NOTHING], np.uint8), kinds[:-1]])
    changes = (kinds != before) | (kinds == _WHOLE)
    return np.flatnonzero(changes & (kinds != _NOTHING)), np.flatnonzero(changes & (before != _NOTHING))


def _mixed(hashes: Hashes) -> Hashes:
    """Spread over all bits, since a polynomial's lower bits depend on little."""
    hashes = (hashes ^ (hashes >> np.uint64(32))) * _MIX
    return hashes ^ (hashes >> np.uint64(29))


@cache
def _kinds() -> UInt8[np.ndarray, " codes"]:
    """What each character of the first plane is; the last entry stands for all beyond it."""
    kinds = np.array([_PART if unicodedata.category(chr(code))[0] in "LMN" else _NOTHING for code in range(1 << 16)])
    for low, high in _ALONE:
        kinds[low : high + 1] *= _WHOLE
    kinds[-1] = _WHOLE
    return kinds.astype(np.uint8)


@cache
def _powers(n: int) -> tuple[Hashes, Hashes]:
    """The powers of _BASE modulo 2^64, and those of its inverse."""
    bases = (_BASE, np.uint64(pow(int(_BASE), -1, 1 << 64)))
    powers, inverses = (np.cumprod(np.append(np.uint64(1), np.full(n, base)), dtype=np.uint64) for base in bases)
    return powers, inverses


def excerpts(wanted: Sequence[tuple[int, str]], documents: Iterable[str]) -> list[str]:
    """For each (number of a document, text): what the document says where the text begins, or else its beginning."""
    numbers = {number for number, _ in wanted}
    up_to_last = enumerate(islice(documents, max(numbers, default=-1) + 1))
    found = {number: document for number, document in up_to_last if number in numbers}
    return [_excerpt(found[number], text) for number, text in wanted]


def _excerpt(document: str, text: str) -> str:
    beginning = r"\W+".join(re.escape(word) for word in re.findall(r"\w+", text)[:N])
    place = re.search(beginning, document, re.IGNORECASE)
    start = max(0, place.start() - EXCERPT_CHARS // 4) if place else 0
    stop = start + EXCERPT_CHARS
    return f"{'…' if start else ''}{document[start:stop]}{'…' if stop < len(document) else ''}"
