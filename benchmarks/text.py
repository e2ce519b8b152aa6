"""Learning a vocabulary, and raw text to shards, beside tokenizers, datasets and datatrove.

`python -m benchmarks.text [--corpus FILE.jsonl] [--megabytes 128]`. Without a corpus, sentences are drawn from the
words of the quickstart's glosses. Both tasks end with the same ids; ours run as stages of a pipeline, on a Ray of their
own. A vocabulary is learned from the first 32 megabytes. The first 8 are to warm up on; ours to shards does so on all,
since its workers grow to the size of their tasks, which the rivals' speed does not depend on.
With `--scale 512` it is instead ours on 512, 1,024 and 2,048 megabytes: time should grow as the text does, and memory
not at all.
"""

import argparse
import atexit
import gzip
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.harness import Contender, Race, Turn, race, report
from benchmarks.learnt import Learnt
from benchmarks.timing import machine
from jobs.launch_ray import RayOptions, connected, on_ray
from pipeline.bpe import TokenizerConfig, by_reference, learn
from pipeline.runner import build
from pipeline.stages.corpus import CorpusConfig, CorpusStage
from pipeline.stages.shards import ShardsConfig, ShardsStage
from pipeline.store import Store

GLOSSES = Path("data/quickstart/wordnet-glosses.txt.gz")
VOCAB = 16384
T = TypeVar("T")
WARM_UP, SMALL, MEGABYTES = 8.0, 32.0, 128.0
LEARNING = TokenizerConfig(vocab_size=VOCAB, min_frequency=2, lowercase=False)
GOALS = {"vocabulary": {"tokenizers": 5.0}, "shards": {"datasets.map": 15.0, "datatrove": 5.0}}


def drawn_texts(megabytes: float) -> Iterator[str]:
    """Texts of 20 to 400 words, drawn as often as they are in the glosses, so that most words are rare."""
    words = np.array(gzip.decompress(GLOSSES.read_bytes()).decode().split(), dtype=object)
    random, left = np.random.default_rng(0), megabytes * 1e6
    while left > 0:
        text = " ".join(words[random.integers(0, len(words), random.integers(20, 400))])
        left -= len(text)
        yield text


def write_corpus(file: Path, source: Path | None, megabytes: float) -> float:
    """A jsonl file of about that size; the bytes of its texts."""
    texts = drawn_texts(megabytes) if source is None else _first_megabytes(source, megabytes)
    size = 0
    with file.open("w", encoding="utf-8") as out:
        for text in texts:
            size += len(text.encode())
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return float(size)


def _first_megabytes(source: Path, megabytes: float) -> Iterator[str]:
    left = megabytes * 1e6
    with source.open(encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            left -= len(text)
            yield text
            if left < 0:
                return


def texts_of(file: str) -> list[str]:
    with Path(file).open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def vocabulary_ours(turn: Turn, file: str, size: float, warm_up: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        for texts in _passes(texts_of(warm_up), texts_of(file)):
            learn(partial(iter, texts), LEARNING, Path(work), torch.get_num_threads())
            turn(size / 1e6)


def vocabulary_tokenizers(turn: Turn, file: str, size: float, warm_up: str) -> None:
    for texts in _passes(texts_of(warm_up), texts_of(file)):
        by_reference(texts, LEARNING)
        turn(size / 1e6)


def shards_ours(turn: Turn, file: str, size: float, warm_up: str, tokenizer: str) -> None:
    """Corpus and shards, as `gristmill run` makes them; each time in a home of its own, so that nothing is reused."""
    with tempfile.TemporaryDirectory() as place:
        options = RayOptions(home=Path(place), cpus=torch.get_num_threads())
        with on_ray(options) as submit:
            connected(options)
            for number, path in enumerate(_passes(warm_up, file)):
                corpus = CorpusStage(config=CorpusConfig(path=path))
                shards = ShardsStage(config=ShardsConfig(), corpus=corpus, tokenizer=Learnt(file=tokenizer))
                list(build([shards], Store(Path(place) / str(number)), submit, cpus=options.cpus))
                turn(size / 1e6)


def _passes(warm_up: T, whole: T) -> Iterator[T]:
    """What to read, pass after pass."""
    return itertools.chain([warm_up], itertools.repeat(whole))


def datasets_map(turn: Turn, file: str, size: float, warm_up: str, tokenizer: str) -> None:
    from datasets import disable_caching, disable_progress_bars, load_dataset
    from tokenizers import Tokenizer

    disable_caching()
    disable_progress_bars()
    encode = Tokenizer.from_file(tokenizer)
    with tempfile.TemporaryDirectory() as place:
        for number, path in enumerate(_passes(warm_up, file)):
            rows: Any = load_dataset("json", data_files=path, split="train", cache_dir=f"{place}/{number}")
            rows = rows.map(
                lambda batch: {"ids": [found.ids for found in encode.encode_batch(batch["text"])]},
                batched=True,
                remove_columns=["text"],
            )
            rows.save_to_disk(f"{place}/{number}-out")
            turn(size / 1e6)


def datatrove(turn: Turn, file: str, size: float, warm_up: str, tokenizer: str) -> None:
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.tokens import DocumentTokenizer  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as place:
        for number, path in enumerate(map(Path, _passes(warm_up, file))):
            LocalPipelineExecutor(
                pipeline=[
                    JsonlReader(str(path.parent), glob_pattern=path.name, doc_progress=False),
                    DocumentTokenizer(f"{place}/{number}", tokenizer_name_or_path=tokenizer, eos_token="<|eos|>"),
                ],
                logging_dir=f"{place}/{number}-logs",
            ).run()
            turn(size / 1e6)


def learners(small: "Prepared") -> list[Contender]:
    common = {"file": str(small.file), "size": small.size, "warm_up": str(small.warm_up)}
    names = {"gristmill": "ours", "tokenizers": "tokenizers"}
    return [Contender(name, f"benchmarks.text:vocabulary_{function}", common) for name, function in names.items()]


def encoders(file: Path, size: float, small: "Prepared") -> list[Contender]:
    common = {"file": str(file), "size": size, "warm_up": str(small.warm_up), "tokenizer": str(small.tokenizer)}
    return [
        Contender("gristmill", "benchmarks.text:shards_ours", {**common, "warm_up": str(file)}),
        Contender("datasets.map", "benchmarks.text:datasets_map", common),
        Contender("datatrove", "benchmarks.text:datatrove", common, {"PYTHONPATH": ".peers"}, ["datatrove"]),
    ]


def races(shape: str = "", source: Path | None = None, megabytes: float = MEGABYTES) -> Iterator[Race]:
    """Of text alone: `shape` is not asked for."""
    del shape
    small = prepared(source)
    yield Race(_title("vocabulary", small.size), learners(small), "MB", GOALS["vocabulary"])
    file = small.file.with_name("large.jsonl")
    size = write_corpus(file, source, megabytes)
    less = {"file": str(small.file), "size": small.size}
    yield Race(_title("shards", size), encoders(file, size, small), "MB", GOALS["shards"], less=less)


def _title(task: str, size: float) -> str:
    return f"{task}, {size / 1e6:.0f} MB"


@dataclass(frozen=True)
class Prepared:
    """A corpus, its size in bytes, its beginning, and a tokenizer that was learned from it: until this process ends."""

    file: Path
    size: float
    warm_up: Path
    tokenizer: Path


def prepared(source: Path | None) -> Prepared:
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place)
    file, warm_up = place / "small.jsonl", place / "warm_up.jsonl"
    found = Prepared(file, write_corpus(file, source, SMALL), warm_up, place / "tokenizer.json")
    write_corpus(warm_up, file, WARM_UP)
    learned, _ = learn(lambda: texts_of(str(found.file)), LEARNING, place, torch.get_num_threads())
    learned.save(str(found.tokenizer))
    return found


def scale(source: Path | None, megabytes: float, rounds: int) -> str:
    """Ours on 1, 2 and 4 times the text: a table."""
    lines = [
        "| MB | seconds | MB/s | peak MiB of the largest process | of all, what they share more than once |",
        "|---|---|---|---|---|",
    ]
    small = prepared(source)
    with tempfile.TemporaryDirectory() as place:
        whole, part = Path(place) / "whole.jsonl", Path(place) / "part.jsonl"
        write_corpus(whole, source, 4 * megabytes)
        for times in (1, 2, 4):
            size = write_corpus(part, whole, times * megabytes)
            (ours, *_) = encoders(part, size, small)
            (measured,) = race([ours], rounds=rounds)
            cells = (size / 1e6 / measured.rate, measured.rate, measured.peaks_mib[0], measured.peak_mib)
            lines.append(f"| {size / 1e6:,.0f} | {' | '.join(f'{cell:,.1f}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="jsonl with a field text")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="of the race to shards")
    parser.add_argument("--scale", type=float, metavar="MEGABYTES", help="no race: ours on 1, 2 and 4 times as much")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(machine())
    if given.scale:
        print(f"\n{scale(given.corpus, given.scale, given.rounds)}")
        return
    for one in races("", given.corpus, given.megabytes):
        print(f"\n{report(one, rounds=given.rounds).text}", flush=True)


if __name__ == "__main__":
    main()
