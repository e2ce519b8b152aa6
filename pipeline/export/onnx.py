"""A graph that onnxruntime runs: any pooling and any body, with its weights in a safetensors file that we read too.

`model.onnx` holds operators alone and points into `model.safetensors`, which with `model.json` and `tokenizer.json` is
a classifier as `pipeline.weights` reads it: one copy of the weights serves both programs.
"""

import json
import logging
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.config import ModelConfig
from model.interchange import CALIBRATION
from model.rows import ROWS, Rows
from pipeline.classify import tokenize
from pipeline.export import Subject
from pipeline.export._verify import ALONE, PADDED, Expected, Logits, check_labels, check_reading, padded
from pipeline.tokens import load_tokenizer, special_ids
from pipeline.weights import CONFIG, TOKENIZER, WEIGHTS, write_classifier

if TYPE_CHECKING:
    from onnx import ModelProto

PROGRAM = "onnxruntime"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
GRAPH = "model.onnx"
INPUTS = ("input_ids", "attention_mask")
"""int64 [batch, length] both; the mask is 1 on a text's tokens and 0 on the padding to their right."""


def refusal(cfg: ModelConfig, pooling: str, *, ngrams: bool = False) -> str | None:
    del cfg, ngrams
    return None if pooling in ROWS else f"finetune.pooling={pooling} has no form without packed rows"


def write(folder: Path, subject: Subject) -> None:
    model, labels, windows = subject.loaded.model, subject.loaded.labels, subject.loaded.windows
    params = dict(model.named_parameters())
    write_classifier(
        folder,
        params,
        model.cfg,
        labels,
        model.head.pooling,
        subject.tokenizer,
        windows,
        multi_label=model.head.multi_label,
        ngrams=model.ngrams,
    )
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    asked = {"inputs": list(INPUTS), "padding_id": special_ids(subject.loaded.tokenizer).pad}
    record = {**record, CALIBRATION: subject.temperature, "graph": asked}
    (folder / CONFIG).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    graph = _traced(Rows(model))
    _point_at_weights(graph, folder / WEIGHTS)
    (folder / GRAPH).write_bytes(graph.SerializeToString(deterministic=True))


def _traced(rows: Rows) -> "ModelProto":
    """The graph with dynamic batch and length, of the operators as they are: onnxruntime optimises what it loads."""
    example = tuple(torch.ones(2, 3, dtype=torch.int64) for _ in INPUTS)  # one tensor for both would be one input
    dynamic = {name: {0: "batch", 1: "length"} for name in INPUTS}
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # "no torchvision"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            rows.eval(),
            example,
            input_names=list(INPUTS),
            output_names=["logits"],
            dynamic_shapes=dynamic,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert program is not None, "an export without a file returns its program"
    graph = program.model_proto
    whole = graph.graph
    for part in (graph, whole, *whole.node, *whole.value_info, *whole.initializer, *whole.input, *whole.output):
        part.ClearField("metadata_props")  # stack traces with the paths of this machine
    return graph


def _point_at_weights(graph: "ModelProto", weights: Path) -> None:
    """Take the bytes of every weight out of the graph, and say where in the file they are."""
    from onnx import TensorProto

    places = _places(weights)
    for tensor in graph.graph.initializer:
        if tensor.name in places:
            offset, length = places[tensor.name]
            assert len(tensor.raw_data) == length, f"{tensor.name} was changed by the exporter"
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": weights.name, "offset": offset, "length": length}.items():
                tensor.external_data.add(key=key, value=str(value))


def _places(weights: Path) -> dict[str, tuple[int, int]]:
    """`{name: (offset, length)}` in bytes, of every tensor of a safetensors file."""
    with weights.open("rb") as file:
        (header_length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_length))
    spans = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + header_length + begin, end - begin) for name, (begin, end) in spans.items()}


def logits(folder: Path, expected: Expected) -> Mapping[str, Logits]:
    """What onnxruntime makes of the graph on a CPU, and our tokenizer of its tokenizer.json."""
    import onnxruntime

    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    check_labels(record["labels"], expected)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    documents = [ids.tolist() for ids in tokenize(tokenizer, expected.texts, record["model"]["seq_len"])]
    check_reading("tokenizers", documents, expected)
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    pad = record["graph"]["padding_id"]
    return {PADDED: _run(session, documents, pad), ALONE: torch.cat([_run(session, [ids], pad) for ids in documents])}


def _run(session: Any, documents: list[list[int]], pad: int) -> Logits:
    feeds = dict(zip(INPUTS, padded(documents, pad), strict=True))
    return torch.from_numpy(session.run(["logits"], feeds)[0])
