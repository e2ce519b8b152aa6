"""The corpus as token ids on disk, split by document into training and validation, whoever wrote which shard."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Gt, Lt
from jaxtyping import Bool, Int64

from pipeline.encoder import (
    FAST,
    JUDGED_CHARS,
    REFERENCE,
    Disagreement,
    Encode,
    checked,
    fast_engine,
    reference_engine,
)
from pipeline.errors import DataError
from pipeline.faults import fault_point
from pipeline.identity import knob
from pipeline.stage import Context, Resources, Stage
from pipeline.stages.corpus import Corpus
from pipeline.stages.tokenizer import TokenizerFile
from pipeline.tables import n_groups, read_group
from pipeline.text import unit_hashes
from pipeline.token_stream import TokenStream

log = logging.getLogger("gristmill")

__all__ = ["ShardsConfig", "ShardsStage", "Split", "TokenShards", "TokenStream"]

Split = Literal["train", "validation"]
SPLITS: tuple[Split, Split] = ("train", "validation")
TASKS_PER_CORE = 8
"""Enough for all to end at about the same time."""
SHARDS_AIMED_AT = 64
"""How many shards a corpus of middling size is spread over; more cores than that find work only in a larger one."""


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """How the corpus is split and encoded."""

    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.01
    """The part of the documents kept for validation, chosen by a hash of their text; at least one document."""
    split_seed: Annotated[int, Ge(0)] = 0
    """Another number chooses other validation documents."""
    tasks: Annotated[int, Ge(0)] = knob(0)
    """Encode in so many parallel tasks; 0 is eight a core, or one a shard where there are fewer."""


@dataclass(frozen=True)
class TokenShards:
    """Encoded documents, each between bos and eos."""

    path: Path

    def split(self, name: Split) -> TokenStream:
        """The tokens of one split, memory-mapped."""
        index = self.index
        split = index["splits"][name]
        return TokenStream(
            path=self.path,
            name=name,
            dtype=index["dtype"],
            shards=tuple((shard["file"], shard["tokens"]) for shard in split["shards"]),
            n_documents=split["documents"],
            n_bytes=split["bytes"],
        )

    @property
    def index(self) -> dict[str, Any]:
        """What `index.json` holds: dtype, vocab_size; for each split its documents, tokens, text bytes and shards."""
        return json.loads((self.path / "index.json").read_text())


@dataclass(frozen=True)
class Unit:
    """The work of one shard: some row groups of one part. Depends on the corpus only."""

    number: int
    part: Path
    groups: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that encoding some shards needs, in any process of this machine."""

    units: tuple[Unit, ...]
    tokenizer: Path
    out: Path
    work: Path
    dtype: str
    threshold: float
    purpose: str
    judged_chars: int
    """Of each row group, which both engines encode at least."""
    trusting: bool = True
    """Whether the fast engine may encode, where it is asked too."""


@dataclass
class Written:
    """What one shard of one split holds, and what encoded it. `lowest` is the lowest hash of the unit's documents."""

    file: str
    engine: str
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    lowest: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ShardsStage(Stage[TokenShards]):
    """Encode the corpus with the tokenizer."""

    config: ShardsConfig
    corpus: Stage[Corpus]
    tokenizer: Stage[TokenizerFile]

    @property
    def resources(self) -> Resources:
        return Resources(cpus=0)

    def run(self, ctx: Context) -> None:
        corpus, tokenizer = ctx.open(self.corpus), ctx.open(self.tokenizer)
        vocab_size, work = tokenizer.vocab_size, units(corpus)
        task = Task(
            units=work,
            tokenizer=tokenizer.file,
            out=ctx.out,
            work=ctx.work,
            dtype="<u2" if vocab_size < 1 << 16 else "<u4",
            threshold=self.config.validation_fraction,
            purpose=f"validation {self.config.split_seed}",
            judged_chars=-(-JUDGED_CHARS // max(1, sum(len(unit.groups) for unit in work))),
        )
        written = self._encode(ctx, task)
        if not all(_documents(written, split) for split in SPLITS):
            written = self._encode(ctx, replace(task, threshold=_just_above_lowest(written)))
        index = _index(written, task, vocab_size)
        (ctx.out / "index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        ctx.notes["metrics"] = _metrics(index)
        ctx.notes["datasets"] = [ctx.dataset(self.corpus, "corpus")]
        train, validation = (index["splits"][split]["tokens"] for split in SPLITS)
        slow = {shard.engine for split in SPLITS for shard in written[split]} - {FAST}
        by = f", encoded by {', '.join(slow)}" if slow else ""
        ctx.notes["headline"] = f"{train:,} tokens to train on, {validation:,} to validate{by}"

    def load(self, path: Path) -> TokenShards:
        return TokenShards(path)

    def _encode(self, ctx: Context, task: Task) -> dict[Split, list[Written]]:
        """The shards: none by the fast engine where it is wrong about any text."""
        tasks = _divide(task, self.config.tasks or TASKS_PER_CORE * ctx.cpus)
        results = ctx.spread(encode_task, tasks, f"encoding {len(task.units)} shards")
        done = [result for result in results if result is not None]
        if len(done) < len(results):
            log.warning("%s gives other ids than %s for some text, so that one encodes all of them", FAST, REFERENCE)
            return self._encode(ctx, replace(task, trusting=False))
        return {split: sorted((w for r in done for w in r[split]), key=lambda w: w.file) for split in SPLITS}


def units(corpus: Corpus) -> tuple[Unit, ...]:
    """The shards to write: about 64, of no less than a row group and no more than a part of the corpus each."""
    counts = [(part, n_groups(part)) for part in corpus.parts]
    size = -(-sum(count for _, count in counts) // SHARDS_AIMED_AT)
    ranges = [(part, tuple(range(first, min(first + size, n)))) for part, n in counts for first in range(0, n, size)]
    return tuple(Unit(number, part, groups) for number, (part, groups) in enumerate(ranges))


def _divide(task: Task, tasks: int) -> list[Task]:
    n = min(tasks, len(task.units))
    return [replace(task, units=task.units[i::n]) for i in range(n)]


def encode_task(task: Task) -> dict[Split, list[Written]] | None:
    """Write the shards of a task, and the lengths of their documents beside them in the work folder.

    None where the engines disagree on some text: what is written then is not to be kept.
    """
    reference = reference_engine(task.tokenizer)
    fast = fast_engine(task.tokenizer) if task.trusting else None
    if fast is None:
        engine, encode = REFERENCE, reference
    else:
        engine, encode = FAST, partial(checked, fast, reference, task.judged_chars)
    try:
        shards = [_encode_unit(task, unit, engine, encode) for unit in task.units]
    except Disagreement:
        return None
    return {split: [shard[split] for shard in shards] for split in SPLITS}


def _encode_unit(task: Task, unit: Unit, engine: str, encode: Encode) -> dict[Split, Written]:
    fault_point("shards.unit")
    written: dict[Split, Written] = {split: Written(f"{split}-{unit.number:05d}.bin", engine) for split in SPLITS}
    lengths: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context((task.out / written[split].file).open("wb")) for split in SPLITS}
        for texts in (read_group(unit.part, group) for group in unit.groups):
            hashes = unit_hashes(texts, task.purpose)
            sizes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts])
            encoded = encode(texts)
            held_out = hashes < task.threshold
            for split in SPLITS:
                chosen = held_out == (split == "validation")
                lengths[split].append(encoded.lengths[chosen])
                written[split].bytes += int(sizes[chosen].sum())
                written[split].lowest = min(written[split].lowest, hashes.min(initial=1.0))
            ids = encoded.ids.astype(task.dtype)
            for is_validation, start, stop in _runs(held_out, encoded.lengths):
                files["validation" if is_validation else "train"].write(ids[start:stop].data)
    for split in SPLITS:
        _finish(task, written[split], np.concatenate(lengths[split]))
    return written


def _runs(held_out: Bool[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"]) -> Iterator[tuple[bool, int, int]]:
    """Whether documents that follow each other are held out, and the first of their tokens and that after the last."""
    firsts = np.flatnonzero(np.diff(held_out, prepend=~held_out[:1]))
    starts = np.concatenate([[0], np.cumsum(lengths)])[[*firsts, len(lengths)]]
    yield from zip(held_out[firsts], starts[:-1], starts[1:], strict=True)


def _finish(task: Task, written: Written, lengths: np.ndarray) -> None:
    written.documents, written.tokens = len(lengths), int(lengths.sum())
    np.save(_lengths_file(task, written), lengths)
    if not len(lengths):
        (task.out / written.file).unlink()


def _lengths_file(task: Task, written: Written) -> Path:
    return task.work / f"{written.file}.lengths.npy"


def _documents(written: Mapping[Split, Sequence[Written]], split: Split) -> int:
    return sum(shard.documents for shard in written[split])


def _just_above_lowest(written: Mapping[Split, Sequence[Written]]) -> float:
    """The threshold that chooses one text alone, for a corpus too small for its fraction."""
    return float(np.nextafter(min(shard.lowest for shard in written["train"]), 1.0))


def _index(written: Mapping[Split, Sequence[Written]], task: Task, vocab_size: int) -> dict[str, Any]:
    if not _documents(written, "train"):
        raise DataError(
            "corpus: all documents have the same text, so nothing is left to train on once one is kept for validation. "
            "Give more text, or set corpus.document: line"
        )
    splits = {split: _split_index(written[split], task, split) for split in SPLITS}
    return {"dtype": task.dtype, "vocab_size": vocab_size, "splits": splits}


def _split_index(written: Sequence[Written], task: Task, split: Split) -> dict[str, Any]:
    shards = [shard for shard in written if shard.documents]
    n_documents = sum(shard.documents for shard in shards)
    starts = np.lib.format.open_memmap(
        task.out / f"{split}.documents.npy", mode="w+", dtype="<i8", shape=(n_documents + 1,)
    )
    first = 0
    for shard in shards:
        ends = np.cumsum(np.load(_lengths_file(task, shard)))
        starts[first + 1 : first + 1 + len(ends)] = starts[first] + ends
        first += len(ends)
    starts.flush()
    return {
        "documents": n_documents,
        "tokens": sum(shard.tokens for shard in shards),
        "bytes": sum(shard.bytes for shard in shards),
        "shards": [{"file": shard.file, "tokens": shard.tokens, "documents": shard.documents} for shard in shards],
    }


def _metrics(index: Mapping[str, Any]) -> dict[str, float]:
    names = ("documents", "tokens", "bytes")
    return {f"{split}_{name}": float(index["splits"][split][name]) for split in SPLITS for name in names}
