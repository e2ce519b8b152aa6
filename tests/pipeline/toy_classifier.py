"""A classifier with random weights and the labelled texts to measure it on, without any training."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import trainers

from model.config import ModelConfig
from model.decoder import Decoder
from model.heads import Classifier
from model.init import initialize
from pipeline.bpe import blank_tokenizer
from pipeline.stage import Context, Stage
from pipeline.stages.baseline import Baseline
from pipeline.stages.evaluate import Evaluate, EvaluateConfig
from pipeline.stages.labels import Labels, LabelsConfig, LabelsStage
from pipeline.tokens import BOS, EOS, PAD
from pipeline.weights import ClassifierFiles, write_classifier

CLASSES = {"fruit": "apple pear plum fig", "metal": "iron zinc tin lead", "a|b <i>_": "one two three four"}
SCRIPT = "<script>alert('x')</script>"


@dataclass(frozen=True, kw_only=True)
class RandomClassifier(Stage[ClassifierFiles]):
    """Weights drawn from `seed`, large enough for the logits to depend on what is read."""

    labels: Stage[Labels]
    seed: int = 0
    scale: float = 4.0
    pooling: str = "last"

    def run(self, ctx: Context) -> None:
        names = ctx.open(self.labels).names
        tokenizer = blank_tokenizer(lowercase=True)
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[BOS, EOS, PAD], show_progress=False)
        tokenizer.train_from_iterator(CLASSES.values(), trainer)
        tokenizer.save(str(ctx.work / "tokenizer.json"))
        cfg = ModelConfig(
            vocab_size=tokenizer.get_vocab_size(), d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=24
        )
        classifier = random_classifier(cfg, len(names), self.seed, self.scale, self.pooling)
        params = dict(classifier.named_parameters())
        write_classifier(ctx.out, params, cfg, names, self.pooling, ctx.work / "tokenizer.json")

    def load(self, path: Path) -> ClassifierFiles:
        return ClassifierFiles(path)


def random_classifier(cfg: ModelConfig, n_labels: int, seed: int, scale: float, pooling: str = "last") -> Classifier:
    classifier = Classifier(Decoder(cfg), n_labels, pooling)
    initialize(classifier, seed)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)
    return classifier


def labels_of(folder: Path, rows: int = 240) -> LabelsStage:
    """Texts of words that give their class away, one of them hostile."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(rows):
        label = draw.choice(list(CLASSES))
        words = draw.choices([*CLASSES[label].split(), "and", "the", "of"], k=draw.randint(1, 30))
        split = ("train", "train", "validation", "test")[number % 4]
        text = f"{' '.join(words)} {SCRIPT} {number}"
        lines.append(json.dumps({"text": text, "label": label, "split": split}))
    (folder / "toy.jsonl").write_text("\n".join(lines))
    return LabelsStage(config=LabelsConfig(path=str(folder / "toy.jsonl"), split="split"))


def evaluate_of(labels: LabelsStage, *, random_init: bool = False, **settings: Any) -> Evaluate:
    config = EvaluateConfig(**{"bootstrap": 100, **settings})
    return Evaluate(
        config=config,
        classifier=RandomClassifier(labels=labels),
        labels=labels,
        random_init=RandomClassifier(labels=labels, seed=1, label="random-init") if random_init else None,
        baselines=tuple(Baseline(rival=rival, labels=labels, label=rival) for rival in config.baselines),
    )
