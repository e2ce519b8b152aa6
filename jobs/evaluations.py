"""What the store knows of a model by the bytes of its weights: what it was tested on, and what it learned from."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.publish import Manifest, file_digest
from pipeline.stages.labels import Labels
from pipeline.store import Store


def tested_on(model: Path, store: Store) -> Path | None:
    """The predictions of an evaluation of the model in a folder, which hold its test texts and their classes."""
    evaluation = next(_evaluations(model, store), None)
    return evaluation and store.open("evaluate", evaluation.meta["key"]) / "predictions.parquet"


def learned_from(model: Path, store: Store) -> set[str]:
    """The texts that the model in a folder was trained or chosen by; none where they are not in the store."""
    for evaluation in _evaluations(model, store):
        labels = evaluation.meta["input_keys"]["labels"]
        if store.find(labels["kind"], labels["key"]) is not None:
            found = Labels(store.open(labels["kind"], labels["key"]))
            return {text for split in ("train", "validation") for text in found.split(split).texts}
    return set()


def _evaluations(model: Path, store: Store) -> Iterator[Manifest]:
    """Those of this model, exported or not, wherever it was copied to."""
    weights = {file_digest(file) for file in model.iterdir() if file.name in ("model.safetensors", "model.onnx")}
    exports = [export for export in store.manifests("export") if _holds(export, weights)]
    exported = {export.meta["input_keys"]["evaluation"]["key"] for export in exports}
    for evaluation in store.manifests("evaluate"):
        if evaluation.meta["key"] in exported or _measures(store, evaluation, weights):
            yield evaluation


def _holds(manifest: Manifest, weights: set[str]) -> bool:
    return any(entry["blake3"] in weights for entry in manifest.files.values())


def _measures(store: Store, evaluation: Manifest, weights: set[str]) -> bool:
    """Whether an evaluation is of a classifier with these weights, before it was exported."""
    needed = evaluation.meta["input_keys"]["classifier"]
    classifier = store.find(needed["kind"], needed["key"])
    return classifier is not None and _holds(classifier, weights)
