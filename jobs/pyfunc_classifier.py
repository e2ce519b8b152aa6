"""The exported classifier behind MLflow's predict call. It travels with the model, so it imports nothing of ours."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

ARTIFACT = "classifier"
WINDOWS = "reading_windows"
ROWS_PER_BATCH = 32
ONE_WINDOW = {"count": 1, "overlap": 0}


LIKELY = 0.5
"""The probability from which on a label is answered where there may be several."""


class Prediction(TypedDict, total=False):
    """With `labels` in place of `label` where the classifier may give a text several, or none."""

    label: str
    labels: list[str]
    probabilities: dict[str, float]


class Network(NamedTuple):
    """`logits(ids, mask)` of rows padded on the right, int64 [rows, tokens] both; without `padding` one row at a time.

    `windows` says in how many windows of `seq_len` tokens a long text is read, and how many tokens neighbours share.
    """

    logits: Callable[[np.ndarray, np.ndarray], np.ndarray]
    labels: list[str]
    seq_len: int
    padding: int | None
    windows: dict[str, int]
    multi_label: bool


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
        encodings = self.tokenizer.encode_batch([_as_trained_on(text) for text in model_input])
        texts = [self._windows(encoding.ids) for encoding in encodings]
        logits = self._logits([window for windows in texts for window in windows])
        return [self._prediction(np.mean([next(logits) for _ in windows], axis=0)) for windows in texts]

    def _windows(self, ids: list[int]) -> list[list[int]]:
        """What the model reads of a text: all, or its beginning, or several parts of equal length, one after the other.

        Each has the tokens that stand around a text, since the model may read its answer at the last one.
        """
        limit, count, overlap = self.network.seq_len, self.network.windows["count"], self.network.windows["overlap"]
        if len(ids) <= limit or count == 1:
            return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]]
        step = limit - 2 - overlap
        text = ids[1:-1][: count * step + overlap]
        new = len(text) - overlap
        n = -(-new // step)
        starts = [i * new // n for i in range(n + 1)]
        return [[ids[0], *text[a : b + overlap], ids[-1]] for a, b in pairwise(starts)]

    def _logits(self, rows: list[list[int]]) -> Iterator[np.ndarray]:
        """Those of each row. Rows of one batch are padded, so a model that names no padding takes one at a time."""
        size, padding = (1, 0) if self.network.padding is None else (ROWS_PER_BATCH, self.network.padding)
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            longest = max(map(len, batch))
            ids = np.array([[*ids, *[padding] * (longest - len(ids))] for ids in batch], dtype=np.int64)
            mask = np.array([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch], dtype=np.int64)
            yield from self.network.logits(ids, mask)

    def _prediction(self, logits: np.ndarray) -> Prediction:
        several = self.network.multi_label
        row = (_sigmoid if several else _softmax)(logits).tolist()
        probabilities = dict(zip(self.network.labels, row, strict=True))
        if several:
            likely = [label for label, p in probabilities.items() if p >= LIKELY]
            return {"labels": likely, "probabilities": probabilities}
        return {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}


def _as_trained_on(text: str) -> str:
    """Line ends as `\\n`, and a NUL as U+FFFD, as in the texts that the model was made of."""
    return text.replace("\0", "\ufffd").replace("\r\n", "\n").replace("\r", "\n")


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
    windows = getattr(config, WINDOWS, ONE_WINDOW)
    multi_label = config.problem_type == "multi_label_classification"
    return Network(logits, labels, config.max_position_embeddings, config.pad_token_id, windows, multi_label)


def _of_onnxruntime(folder: Path) -> Network:
    """A graph beside the record of what it reads and says."""
    import onnxruntime

    record: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def logits(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["logits"], dict(zip(record["graph"]["inputs"], (ids, mask), strict=True)))[0])

    windows, multi_label = record.get(WINDOWS, ONE_WINDOW), record.get("multi_label", False)
    seq_len, padding = record["model"]["seq_len"], record["graph"]["padding_id"]
    return Network(logits, record["labels"], seq_len, padding, windows, multi_label)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


set_model(TextClassifier())
