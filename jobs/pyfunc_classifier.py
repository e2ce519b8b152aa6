"""The exported classifier behind MLflow's predict call. It travels with the model, so it imports nothing of ours."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

ARTIFACT = "classifier"
TEXTS_PER_BATCH = 32


class Prediction(TypedDict):
    label: str
    probabilities: dict[str, float]


class Network(NamedTuple):
    """`logits(ids, mask)` of rows padded on the right, int64 [texts, tokens] both; without `padding` one text a row."""

    logits: Callable[[np.ndarray, np.ndarray], np.ndarray]
    labels: list[str]
    seq_len: int
    padding: int | None


class TextClassifier(PythonModel):
    """Texts in; for each text the label and the calibrated probability of every label out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the files that came with the model. Nothing is fetched, and no code of the folder is run."""
        from tokenizers import Tokenizer

        folder = Path(context.artifacts[ARTIFACT])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # no text can forge a special token
        self.network = _of_transformers(folder) if (folder / "config.json").is_file() else _of_onnxruntime(folder)

    def predict(self, model_input: list[str]) -> list[Prediction]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [prediction for batch in self._batches(model_input) for prediction in self._predict(batch)]

    def _batches(self, texts: list[str]) -> Iterator[list[list[int]]]:
        """Token ids in batches. Texts of one batch are padded, so a model that names no padding takes one at a time."""
        size = 1 if self.network.padding is None else TEXTS_PER_BATCH
        encoded = [self._cut(encoding.ids) for encoding in self.tokenizer.encode_batch(texts)]
        for start in range(0, len(encoded), size):
            yield encoded[start : start + size]

    def _cut(self, ids: list[int]) -> list[int]:
        """At most as long as the model reads; the last token stays, since the model may read its answer there."""
        limit = self.network.seq_len
        return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]

    def _predict(self, batch: list[list[int]]) -> Iterator[Prediction]:
        longest, padding = max(map(len, batch)), self.network.padding or 0
        ids = np.array([[*ids, *[padding] * (longest - len(ids))] for ids in batch], dtype=np.int64)
        mask = np.array([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], dtype=np.int64)
        for row in _softmax(self.network.logits(ids, mask)).tolist():
            probabilities = dict(zip(self.network.labels, row, strict=True))
            yield {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}


def _of_transformers(folder: Path) -> Network:
    """A Hugging Face folder."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
    ).eval()
    config = model.config

    def logits(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits.float().numpy()

    labels = [config.id2label[i] for i in range(config.num_labels)]
    return Network(logits, labels, config.max_position_embeddings, config.pad_token_id)


def _of_onnxruntime(folder: Path) -> Network:
    """A graph beside the record of what it reads and says."""
    import onnxruntime

    record: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def logits(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["logits"], dict(zip(record["graph"]["inputs"], (ids, mask), strict=True)))[0])

    return Network(logits, record["labels"], record["model"]["seq_len"], record["graph"]["padding_id"])


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


set_model(TextClassifier())
