"""The training texts of a labelled task as a corpus, for pretraining to go on with."""

import json
from dataclasses import dataclass
from pathlib import Path

from pipeline.stage import Context, Stage
from pipeline.stages.corpus import Corpus
from pipeline.stages.labels import Labels
from pipeline.tables import TextWriter
from pipeline.text import cut, split_long_words

MAX_WORD_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class TaskText(Stage[Corpus]):
    """The train split alone, without its labels."""

    VERSION = 2
    labels: Stage[Labels]

    def run(self, ctx: Context) -> None:
        texts = ctx.open(self.labels).split("train").texts
        with TextWriter(ctx.out) as writer:
            pieces = (piece for text in dict.fromkeys(texts) for piece in cut(text))
            writer.add(split_long_words(piece, MAX_WORD_BYTES)[0] for piece in pieces)
        record = {"documents": writer.n_documents, "bytes": writer.n_bytes, "parts": writer.n_parts}
        (ctx.out / "corpus.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        ctx.notes["metrics"] = {name: float(value) for name, value in record.items()}
        ctx.notes["headline"] = f"{record['documents']:,} documents, {record['bytes'] / 1e6:.1f} MB"
        ctx.notes["datasets"] = [ctx.dataset(self.labels, "train")]

    def load(self, path: Path) -> Corpus:
        return Corpus(path)
