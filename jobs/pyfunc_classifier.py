"""The exported classifier behind MLflow's predict call. It travels with the model, so it imports nothing of ours."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

ARTIFACT = "classifier"
TEXTS_PER_BATCH = 32


class Prediction(TypedDict):
    label: str
    probabilities: dict[str, float]


class TextClassifier(PythonModel):
    """Texts in; for each text the label and the probability of every label out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the files that came with the model. Nothing is fetched, and no code of the folder is run."""
        from tokenizers import Tokenizer
        from transformers import AutoModelForSequenceClassification

        folder = Path(context.artifacts[ARTIFACT])
        self.model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        ).eval()
        self.config = self.model.config
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def predict(self, model_input: list[str]) -> list[Prediction]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return [prediction for batch in self._batches(model_input) for prediction in self._predict(batch)]

    def _batches(self, texts: list[str]) -> Iterator[list[list[int]]]:
        """Token ids in batches. Texts of one batch are padded, so a model that names no padding takes one at a time."""
        size = TEXTS_PER_BATCH if self.config.pad_token_id is not None else 1
        encoded = [self._cut(encoding.ids) for encoding in self.tokenizer.encode_batch(texts)]
        for start in range(0, len(encoded), size):
            yield encoded[start : start + size]

    def _cut(self, ids: list[int]) -> list[int]:
        """At most as long as the model reads; the last token stays, since the model may read its answer there."""
        limit = self.config.max_position_embeddings
        return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]

    def _predict(self, batch: list[list[int]]) -> Iterator[Prediction]:
        import torch

        longest, padding = max(map(len, batch)), self.config.pad_token_id or 0
        tokens = torch.tensor([[*ids, *[padding] * (longest - len(ids))] for ids in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch])
        with torch.inference_mode():
            rows = self.model(input_ids=tokens, attention_mask=mask).logits.float().softmax(-1).tolist()
        labels = [self.config.id2label[index] for index in range(len(rows[0]))]
        for row in rows:
            probabilities = dict(zip(labels, row, strict=True))
            yield {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}


set_model(TextClassifier())
