"""Builds the data stages on toy files, the way a run does."""

from pathlib import Path
from typing import Any

from pipeline.bpe import TokenizerConfig
from pipeline.runner import Built, build, build_one, submit_here
from pipeline.stage import Stage, plain_map
from pipeline.stages.corpus import CorpusConfig, CorpusStage
from pipeline.stages.labels import LabelsConfig, LabelsStage
from pipeline.stages.shards import ShardsConfig, ShardsStage
from pipeline.stages.tokenizer import TokenizerStage
from pipeline.store import Store

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "another",
    "dog",
    "ran",
    "over",
    "to",
    "it,",
    "slowly;",
    "but",
    "why?",
]


def corpus_of(path: Path | str, **fields: Any) -> CorpusStage:
    return CorpusStage(config=CorpusConfig(path=str(path), **fields))


def tokenizer_of(corpus: CorpusStage, **fields: Any) -> TokenizerStage:
    return TokenizerStage(config=TokenizerConfig(**{"vocab_size": 300, **fields}), corpus=corpus)


def shards_of(corpus: CorpusStage, *, lowercase: bool = False, **fields: Any) -> ShardsStage:
    tokenizer = tokenizer_of(corpus, lowercase=lowercase)
    return ShardsStage(config=ShardsConfig(**fields), corpus=corpus, tokenizer=tokenizer)


def labels_of(path: Path | str, **fields: Any) -> LabelsStage:
    return LabelsStage(config=LabelsConfig(path=str(path), **fields))


def made(stage: Stage[Any], home: Path, map_: Any = plain_map) -> Built:
    """The last stage of a build."""
    store = Store(home)
    events = build([stage], store, lambda job: submit_here(job) if map_ is plain_map else _with(job, map_))
    return [event for event in events if isinstance(event, Built)][-1]


def _with(job: Any, map_: Any) -> Any:
    build_one(job, map_=map_)
    return submit_here(job)


def opened(stage: Stage[Any], home: Path) -> Any:
    """The artifact of a stage, built if need be."""
    built = made(stage, home)
    return stage.load(Store(home).path(stage.kind, built.key))


def sentences(n: int) -> list[str]:
    return [
        " ".join(WORDS[(i * 7 + j * (1 + i % 3)) % len(WORDS)] for j in range(3 + i % 9)) + f" {i}" for i in range(n)
    ]


def toy_text(folder: Path, n: int = 200) -> Path:
    path = folder / "toy.txt"
    path.write_text("\n".join(sentences(n)) + "\n")
    return path
