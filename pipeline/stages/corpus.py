"""Raw files in, clean documents out: UTF-8, no binary, no blank, no word that would stall a tokenizer."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge

from pipeline import sources
from pipeline.errors import DataError
from pipeline.identity import knob
from pipeline.readers import Reading, read_rows, text_of
from pipeline.stage import Context, Stage
from pipeline.tables import Seen, TextWriter, read_texts
from pipeline.text import cut, normalise, split_long_words

PROGRESS_EVERY = 1000


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the raw text is and how it becomes documents."""

    path: str = knob()
    """File, folder, glob or saved dataset: txt, jsonl, csv, tsv, parquet, also .gz or .zst. Only its content counts."""
    text: str = "text"
    """The field or column that holds the text. Plain text has none."""
    document: Literal["line", "file"] = "line"
    """Whether a line or a whole file of plain text is one document."""
    invalid_utf8: Literal["refuse", "repair"] = "refuse"
    """Stop at bytes that are not UTF-8, or put U+FFFD in their place and count them."""
    max_word_bytes: Annotated[int, Ge(64)] = 1024
    """A longer word is broken by spaces: training a tokenizer is quadratic in its length."""
    dedupe: bool = False
    """Keep only the first of documents that are equal."""
    min_chars: Annotated[int, Ge(1)] = 1
    """Drop documents shorter than this, spaces around them not counted."""


@dataclass(frozen=True)
class Corpus:
    """Clean documents on disk, in parquet parts with one column `text`."""

    path: Path

    @property
    def parts(self) -> list[Path]:
        return sorted(self.path.glob("part-*.parquet"))

    @property
    def n_documents(self) -> int:
        return self.counts["documents"]

    @property
    def n_bytes(self) -> int:
        """The UTF-8 bytes of all documents."""
        return self.counts["bytes"]

    @cached_property
    def counts(self) -> dict[str, Any]:
        """What `corpus.json` holds: documents read, kept, and dropped by rule."""
        return json.loads((self.path / "corpus.json").read_text())

    def documents(self) -> Iterator[str]:
        """Every document in order: files by name, then as they stand in them. A few MiB are in memory at a time."""
        return read_texts(self.parts)


@dataclass(frozen=True, kw_only=True)
class CorpusStage(Stage[Corpus]):
    """Read the raw text once and keep it in one clean form."""

    config: CorpusConfig

    def sources(self) -> Mapping[str, str]:
        return sources.digests(self.config.path)

    def run(self, ctx: Context) -> None:
        digest = sources.digest(self.config.path)
        counts: Counter[str] = Counter()
        with TextWriter(ctx.out) as writer:
            for text in self._documents(ctx, counts):
                writer.add(text)
                counts["documents"] += 1
        sources.check_unchanged(self.config.path, digest)
        if not writer.n_documents:
            raise DataError(f"{Path(self.config.path).absolute()}: an empty corpus: {_summary(counts)}. Give some text")
        record = _record(counts, writer)
        (ctx.out / "corpus.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        ctx.notes["metrics"] = _metrics(record)
        ctx.notes["headline"] = f"{record['documents']:,} documents, {record['bytes'] / 1e6:.1f} MB"
        ctx.notes["datasets"] = [sources.described(self.config.path, digest, "corpus")]

    def load(self, path: Path) -> Corpus:
        return Corpus(path)

    def _documents(self, ctx: Context, counts: "Counter[str]") -> Iterator[str]:
        seen = Seen(ctx.work / "seen.sqlite") if self.config.dedupe else None
        with closing(seen) if seen else nullcontext():
            for text in self._texts(ctx, counts):
                rule = self._dropped(text, seen)
                if rule:
                    counts[rule] += 1
                    continue
                text, long_words = split_long_words(text, self.config.max_word_bytes)
                counts["long_words"] += long_words
                yield text

    def _texts(self, ctx: Context, counts: "Counter[str]") -> Iterator[str]:
        found = sources.find(self.config.path)
        total = sum(source.n_bytes for source in found)
        how = Reading(
            repair=self.config.invalid_utf8 == "repair",
            whole_files=self.config.document == "file",
            on_read=lambda count: counts.update(bytes_read=count),
            counts=counts,
        )
        for source in found:
            for row in read_rows(source, [self.config.text], how):
                counts["read"] += 1
                if counts["read"] % PROGRESS_EVERY == 0:
                    ctx.tracker.progress(counts["bytes_read"], total, f"{counts['read']:,} documents")
                pieces = list(cut(normalise(text_of(row, source, self.config.text))))
                counts["cut"] += len(pieces) - 1
                yield from pieces
        ctx.tracker.progress(total, total, f"{counts['read']:,} documents")

    def _dropped(self, text: str, seen: Seen | None) -> str:
        """The rule by which a document is left out, or an empty string."""
        length = len(text.strip())
        if length < self.config.min_chars:
            return "short" if length else "blank"
        return "duplicate" if seen and not seen.add(text) else ""


def _record(counts: "Counter[str]", writer: TextWriter) -> dict[str, Any]:
    return {
        "documents": writer.n_documents,
        "bytes": writer.n_bytes,
        "parts": writer.n_parts,
        "documents_read": counts["read"],
        "dropped": {rule: counts[rule] for rule in ("blank", "short", "duplicate")},
        "cuts_in_long_documents": counts["cut"],
        "long_words_split": counts["long_words"],
        "repaired_utf8": counts["repaired"],
    }


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    flat = {**record, **{f"dropped_{rule}": count for rule, count in record["dropped"].items()}}
    return {name: float(value) for name, value in flat.items() if name != "dropped"}


def _summary(counts: "Counter[str]") -> str:
    dropped = [f"{counts[rule]} {rule}" for rule in ("blank", "short", "duplicate") if counts[rule]]
    return f"{counts['read']} documents read, dropped {', '.join(dropped) or 'none'}"
