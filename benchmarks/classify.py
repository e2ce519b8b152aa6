"""Labelling texts of different lengths beside transformers and ONNX Runtime.

`python -m benchmarks.classify [--shape 10M]`. All run random weights of one shape: transformers its own
LlamaForSequenceClassification; ONNX Runtime our weights, by the graph that our export writes. ONNX Runtime and the
bucketed loop get their texts sorted by length.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.finetune import LABELS, labels, padded
from benchmarks.harness import KEPT_MEMORY, Contender, Race, Turn, command_line
from model.heads import Classifier, LanguageModel, swap_head
from model.init import initialize
from pipeline.bpe import blank_tokenizer
from pipeline.classify import document_probabilities
from pipeline.export import Subject, onnx
from pipeline.precision import Precision
from pipeline.training import prepare_process
from pipeline.weights import LoadedClassifier

TEXTS, BATCH = 512, 32
"""Of a slice, and of a rival's batch."""
GOALS = {"ONNX Runtime fp32, bucketed": 1.5}


def classifier(shape: str) -> Classifier:
    model = LanguageModel(shapes.ours(shape))
    initialize(model, 0)
    return swap_head(model, LABELS, "last", 0)


def ours(turn: Turn, shape: str, precision: Precision) -> None:
    prepare_process(torch.get_num_threads())
    model, documents = classifier(shape), [[ids] for ids in shapes.documents(shape)]
    while True:
        for first in range(0, len(documents), TEXTS):
            document_probabilities(model, documents[first : first + TEXTS], precision=precision)
            turn(TEXTS)


def slices(documents: Sequence[np.ndarray], *, bucketed: bool) -> Iterator[list[list[np.ndarray]]]:
    """The batches of one slice after the other."""
    while True:
        for first in range(0, len(documents), TEXTS):
            part = list(documents[first : first + TEXTS])
            part = sorted(part, key=len) if bucketed else part
            yield [part[start : start + BATCH] for start in range(0, TEXTS, BATCH)]


def work(turn: Turn, shape: str, run: Callable[[dict[str, torch.Tensor]], object], *, bucketed: bool) -> None:
    for batches in slices(shapes.documents(shape), bucketed=bucketed):
        for batch in batches:
            run(padded(batch, labels(len(batch))))
        turn(TEXTS)


def transformers_loop(turn: Turn, shape: str, bucketed: bool, bf16: bool) -> None:
    from transformers import LlamaForSequenceClassification

    config = shapes.llama(shape)
    config.num_labels, config.pad_token_id = LABELS, 2
    model = LlamaForSequenceClassification(config).eval()

    def run(batch: dict[str, torch.Tensor]) -> Any:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    work(turn, shape, run, bucketed=bucketed)


def onnxruntime_loop(turn: Turn, shape: str) -> None:
    import onnxruntime

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokenizer = blank_tokenizer(lowercase=False)
        tokenizer.save(str(folder / "blank.json"))
        loaded = LoadedClassifier(classifier(shape), tokenizer, [str(label) for label in range(LABELS)])
        onnx.write(folder, Subject(loaded, folder / "blank.json", 1.0))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(folder / onnx.GRAPH, options, providers=["CPUExecutionProvider"])

        def run(batch: dict[str, torch.Tensor]) -> Any:
            return session.run(["logits"], {name: batch[name].numpy() for name in onnx.INPUTS})

        work(turn, shape, run, bucketed=True)


def contenders(shape: str) -> list[Contender]:
    def one(name: str, function: str, env: dict[str, str] | None = None, **settings: Any) -> Contender:
        return Contender(name, f"benchmarks.classify:{function}", {"shape": shape, **settings}, env or {})

    return [
        one("gristmill bf16", "ours", precision="bf16"),
        one("gristmill fp32", "ours", precision="fp32"),
        one("transformers fp32, padded", "transformers_loop", bucketed=False, bf16=False),
        one("transformers bf16, bucketed", "transformers_loop", KEPT_MEMORY, bucketed=True, bf16=True),
        one("ONNX Runtime fp32, bucketed", "onnxruntime_loop"),
    ]


def races(shape: str) -> Iterator[Race]:
    yield Race(f"{shape}, texts of 60 tokens in the median", contenders(shape), "texts", GOALS)


if __name__ == "__main__":
    command_line(__doc__, races)
