"""Texts with no class, one or several, which their words give away, and a pipeline that learns to tell them."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from pipeline.bpe import TokenizerConfig
from pipeline.stages.baseline import Baseline
from pipeline.stages.corpus import CorpusConfig, CorpusStage
from pipeline.stages.evaluate import Evaluate, EvaluateConfig
from pipeline.stages.export import Export, ExportConfig
from pipeline.stages.finetune import Finetune, FinetuneConfig
from pipeline.stages.labels import LabelsConfig, LabelsStage
from pipeline.stages.tokenizer import TokenizerStage
from tests.pipeline.recipes import SIMPLE

CLASSES = {
    "<i>metal": "iron zinc tin lead",
    "fruit": "apple pear plum fig",
    "number": "one two three four",
    "sea": "wave tide reef gull",
}
SPLITS = ("train", "train", "train", "validation", "test")


def rows_of(n: int, seed: int = 0, noise: float = 0.0) -> list[dict[str, Any]]:
    """`{"text", "label": [classes], "split"}` each, every class in about a third of the rows; `noise` of them wrong."""
    draw = random.Random(seed)
    return [_row(draw, number, noise) for number in range(n)]


def _row(draw: random.Random, number: int, noise: float) -> dict[str, Any]:
    label = [name for name in CLASSES if draw.random() < 0.35]
    words = [word for name in label for word in draw.choices(CLASSES[name].split(), k=2)]
    words += draw.choices(["and", "the", "of", "is", "a"], k=draw.randint(1, 5))
    draw.shuffle(words)
    label = [name for name in CLASSES if (name in label) != (draw.random() < noise)]
    draw.shuffle(label)
    return {"text": " ".join(words), "label": label, "split": SPLITS[number % len(SPLITS)]}


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Toy:
    """The stages of one pipeline."""

    labels: LabelsStage
    finetune: Finetune
    evaluate: Evaluate
    export: Export


def toy(folder: Path, *, rows: int = 400, formats: tuple[str, ...] = ("hf",), **finetune: Any) -> Toy:
    """A pipeline over `rows` texts, which are written to `folder`."""
    data = rows_of(rows, noise=0.03)
    path = written(folder / "toy.jsonl", data)
    (folder / "corpus.txt").write_text("\n".join(row["text"] for row in data))
    labels = LabelsStage(config=LabelsConfig(path=str(path), split="split", multi_label=True))
    corpus = CorpusStage(config=CorpusConfig(path=str(folder / "corpus.txt")))
    tokenizer = TokenizerStage(config=TokenizerConfig(vocab_size=330), corpus=corpus)
    model = ModelConfig(vocab_size=330, d_model=32, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=64, seq_len=32)
    settings = {"lr": 1e-2, "epochs": 12, "batch_size": 16, "precision": "fp32", "dropout": 0.0, "log_every": 1}
    config = FinetuneConfig(**(SIMPLE | settings | finetune))
    tuned = Finetune(config=config, model=model, base=None, tokenizer=tokenizer, labels=labels)
    other = Finetune(config=config, model=model, base=None, tokenizer=tokenizer, labels=labels, seed=1, label="seed-1")
    measured = EvaluateConfig(bootstrap=100)
    scores = Evaluate(
        config=measured,
        classifier=tuned,
        labels=labels,
        corpus=corpus,
        random_init=other,
        repeats=(other,),
        baselines=tuple(Baseline(rival=rival, labels=labels, label=rival) for rival in measured.baselines),
    )
    export = Export(config=ExportConfig(formats=formats), classifier=tuned, labels=labels, evaluation=scores)
    return Toy(labels, tuned, scores, export)
