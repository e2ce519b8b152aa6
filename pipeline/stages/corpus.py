"""Raw files in, clean documents out: UTF-8, no binary, no blank, no word that would stall a tokenizer."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, MinLen

from pipeline import sources
from pipeline.blocks import read_texts
from pipeline.chunks import Chunk, chunks
from pipeline.errors import DataError
from pipeline.identity import knob
from pipeline.readers import Reading
from pipeline.sources import Source
from pipeline.stage import Context, Stage
from pipeline.tables import Seen, TextWriter, read_documents
from pipeline.text import cut, normalise, split_long_words_of

Progress = Callable[[int, int, str], None]
"""Told how much is done, of how much, and in words."""


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the raw text is and how it becomes documents."""

    path: Annotated[str, MinLen(1)] = knob()
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
        return read_documents(self.parts)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that cleaning a chunk of the raw text needs, in any process of this machine."""

    config: CorpusConfig
    chunk: Chunk
    number: int
    out: Path
    work: Path


@dataclass(frozen=True, kw_only=True)
class CorpusStage(Stage[Corpus]):
    """Read the raw text once and keep it in one clean form."""

    VERSION = 2
    config: CorpusConfig

    def sources(self) -> Mapping[str, str]:
        return sources.digests(self.config.path)

    def run(self, ctx: Context) -> None:
        counts = self._clean(ctx)
        if not counts["documents"]:
            raise DataError(f"{Path(self.config.path).absolute()}: an empty corpus: {_summary(counts)}. Give some text")
        for number, part in enumerate(sorted(ctx.out.glob("chunk-*.parquet"))):
            part.rename(ctx.out / f"part-{number:05d}.parquet")
        record = _record(counts)
        (ctx.out / "corpus.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        ctx.notes["metrics"] = _metrics(record)
        ctx.notes["headline"] = f"{record['documents']:,} documents, {record['bytes'] / 1e6:.1f} MB"
        digest = sources.digest(self.config.path)
        ctx.notes["datasets"] = [sources.described(self.config.path, digest, "corpus")]

    def load(self, path: Path) -> Corpus:
        return Corpus(path)

    def _clean(self, ctx: Context) -> "Counter[str]":
        """All of the raw text, in tasks side by side where it can be cut, into `chunk-*.parquet`; what was counted."""
        config, found = self.config, sources.find(self.config.path)
        # the first of equal documents may be in any chunk
        parts = [tuple(found)] if config.dedupe else chunks(found, by_line=config.document == "line")
        tasks = [Task(config=config, chunk=c, number=i, out=ctx.out, work=ctx.work) for i, c in enumerate(parts)]
        if len(tasks) == 1:
            return clean(tasks[0], ctx.tracker.progress)
        try:
            return sum(ctx.spread(clean, tasks, "reading chunks of the corpus"), Counter())
        except DataError:
            # the first error of all, with its line in the file
            for _ in _texts(config, found, Counter(), ctx.tracker.progress):
                pass
            raise


def _silent(done: int, total: int, text: str) -> None:
    del done, total, text


def clean(task: Task, progress: Progress = _silent) -> "Counter[str]":
    """Write the documents of a chunk; how many of them, and of what else, there are."""
    counts: Counter[str] = Counter()
    seen = Seen(task.work / "seen.sqlite") if task.config.dedupe else None
    with closing(seen) if seen else nullcontext(), TextWriter(task.out, f"chunk-{task.number:05d}") as writer:
        for texts in _texts(task.config, task.chunk, counts, progress):
            kept = list(_kept(texts, task.config, seen, counts))
            broken, long_words = split_long_words_of(kept, task.config.max_word_bytes)
            counts["long_words"] += long_words
            writer.add(broken)
    counts.update(documents=writer.n_documents, bytes=writer.n_bytes, parts=writer.n_parts)
    return counts


def _texts(
    config: CorpusConfig, found: Sequence[Source], counts: "Counter[str]", progress: Progress
) -> Iterator[list[str]]:
    """The texts of some sources in order, some at a time, with the same line ends, and none too long."""
    total = sum(source.n_bytes for source in found)
    how = Reading(
        repair=config.invalid_utf8 == "repair",
        whole_files=config.document == "file",
        on_read=lambda count: counts.update(bytes_read=count),
        counts=counts,
    )
    for source in found:
        for texts in read_texts(source, config.text, how):
            counts["read"] += len(texts)
            progress(counts["bytes_read"], total, f"{counts['read']:,} documents")
            pieces = [piece for text in texts for piece in cut(normalise(text, counts))]
            counts["cut"] += len(pieces) - len(texts)
            yield pieces
    progress(total, total, f"{counts['read']:,} documents")


def _kept(texts: Iterable[str], config: CorpusConfig, seen: Seen | None, counts: "Counter[str]") -> Iterator[str]:
    """The texts that no rule leaves out; `counts` goes up for the rule that does."""
    for text in texts:
        length = len(text.strip())
        if length < config.min_chars:
            counts["short" if length else "blank"] += 1
        elif seen and not seen.add(text):
            counts["duplicate"] += 1
        else:
            yield text


def _record(counts: "Counter[str]") -> dict[str, Any]:
    record = {
        "documents": counts["documents"],
        "bytes": counts["bytes"],
        "parts": counts["parts"],
        "documents_read": counts["read"],
        "dropped": {rule: counts[rule] for rule in ("blank", "short", "duplicate")},
        "cuts_in_long_documents": counts["cut"],
        "long_words_split": counts["long_words"],
        "repaired_utf8": counts["repaired"],
    }
    return record | ({"texts_with_nul": counts["texts_with_nul"]} if counts["texts_with_nul"] else {})


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    flat = {**record, **{f"dropped_{rule}": count for rule, count in record["dropped"].items()}}
    return {name: float(value) for name, value in flat.items() if name != "dropped"}


def _summary(counts: "Counter[str]") -> str:
    dropped = [f"{counts[rule]} {rule}" for rule in ("blank", "short", "duplicate") if counts[rule]]
    return f"{counts['read']} documents read, dropped {', '.join(dropped) or 'none'}"
