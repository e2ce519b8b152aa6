"""The classifier for other programs, calibrated, and published only after each of them computed our logits from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Le, MinLen

from pipeline import export
from pipeline.ancestry import made_from
from pipeline.export import AUTO, READABLE
from pipeline.model_card import ModelFacts, model_card
from pipeline.stage import Context, Stage
from pipeline.stages.blend import BlendStage
from pipeline.stages.evaluate import Evaluation
from pipeline.stages.finetune import Finetune
from pipeline.stages.labels import Labels
from pipeline.weights import TOKENIZER, ClassifierFiles, LoadedClassifier


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How the classifier is handed over."""

    formats: Annotated[tuple[str, ...], MinLen(1)] = (AUTO,)
    """hf (a Hugging Face folder), onnx, gguf; auto is hf, or onnx where transformers has no such model. The first, hf
    or onnx, is what is registered and served; each further one lies in a folder of its name."""
    verify_texts: Annotated[int, Ge(1), Le(10_000)] = 16
    """Test texts, from the shortest to the longest, on which the export must give our logits."""
    tolerance: Annotated[float, Gt(0), Le(1e-2)] = 1e-5
    """Largest difference of a logit, absolute, or relative to the largest logit where that is above 1."""
    language: Annotated[str, MinLen(2)] | None = None
    """Language of the texts for the model card, an ISO 639 code such as en."""
    license: Annotated[str, MinLen(1)] | None = None
    """Licence of the model for the model card, as the Hugging Face hub writes it, such as apache-2.0."""

    def __post_init__(self) -> None:
        known = (AUTO, *export.names())
        for name in self.formats:
            if name not in known:
                raise ValueError(f"formats={list(self.formats)}: {name!r} must be one of {', '.join(known)}")
        if self.formats[0] not in (AUTO, *READABLE):
            raise ValueError(
                f"formats={list(self.formats)} must begin with auto, {' or '.join(READABLE)}: that one is registered "
                f"and served, which {self.formats[0]} cannot be"
            )


@dataclass(frozen=True)
class ExportFolder:
    """The first format, with a model card as README.md, and a folder for each further format."""

    path: Path


@dataclass(frozen=True, kw_only=True)
class Export(Stage[ExportFolder]):
    """Writes, verifies and describes the classifier.

    The evaluation says at what temperature its probabilities are calibrated, and the card shows its scores: new scores
    make a new export. A rebuild costs seconds.
    """

    VERSION = 2

    config: ExportConfig
    classifier: Stage[ClassifierFiles]
    labels: Stage[Labels]
    evaluation: Stage[Evaluation]

    def __post_init__(self) -> None:
        """Refuse what a format cannot express before anything is trained, not after."""
        self._foreseen_formats()

    def load(self, path: Path) -> ExportFolder:
        return ExportFolder(path)

    def check_installed(self) -> None:
        """Raises EnvironmentProblem where the packages of a format are missing here."""
        for name in self._foreseen_formats():
            export.require(name)

    def _foreseen_formats(self) -> list[str]:
        """What will be written, as far as the settings say. Raises UsageError for what cannot be."""
        ngrams = isinstance(self.classifier, BlendStage)
        network = self.classifier.network if isinstance(self.classifier, BlendStage) else self.classifier
        if not isinstance(network, Finetune):
            return []
        return export.choose(self.config.formats, network.shape, network.config.pooling, ngrams=ngrams)

    def run(self, ctx: Context) -> None:
        files, scores = ctx.open(self.classifier), ctx.open(self.evaluation).scores
        loaded, temperature = files.load(), scores.get("temperature") or 1.0
        model = loaded.model
        formats = export.choose(self.config.formats, model.cfg, model.head.pooling, ngrams=model.ngrams is not None)
        wanted = export.expected(loaded, self._texts(ctx, loaded.model.cfg.seq_len), temperature)
        gaps = self._write(ctx.out, formats, export.calibrated(loaded, files.path / TOKENIZER, temperature), wanted)
        facts = self._facts(ctx, loaded, formats, temperature, len(wanted.texts))
        (ctx.out / export.CARD).write_text(model_card(scores, facts), encoding="utf-8")
        ctx.notes["metrics"] = {"export/logit_difference": max(gaps.values())}
        ctx.notes["headline"] = ", ".join(f"{who} gives our logits within {gap:.0e}" for who, gap in gaps.items())
        ctx.notes["model"] = {"role": "classifier"}
        ctx.notes["files"] = [export.CARD]

    def _texts(self, ctx: Context, seq_len: int) -> list[str]:
        texts = ctx.open(self.labels).split("test").texts
        return export.verification_texts(texts, self.config.verify_texts, seq_len)

    def _write(
        self, out: Path, formats: Sequence[str], subject: export.Subject, wanted: export.Expected
    ) -> dict[str, float]:
        """Every format, the first in `out` itself; the largest difference of a logit by the program that gave it."""
        for name in formats:
            export.require(name)
        folders = {name: out if name == formats[0] else out / name for name in formats}
        return {
            export.load(name).PROGRAM: export.export(name, folder, subject, wanted, self.config.tolerance)
            for name, folder in folders.items()
        }

    def _facts(
        self, ctx: Context, loaded: LoadedClassifier, formats: Sequence[str], temperature: float, checked: int
    ) -> ModelFacts:
        labelled_text = ctx.store.find(self.labels.kind, ctx.keys[self.labels.name])
        assert labelled_text is not None, "an input is built before its user"
        return ModelFacts(
            parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
            seq_len=loaded.model.cfg.seq_len,
            language=self.config.language,
            license=self.config.license,
            data_digest=labelled_text.digest,
            checked=checked,
            tolerance=self.config.tolerance,
            stock=formats[0] == "hf",
            programs=" and ".join(export.load(name).PROGRAM for name in formats),
            temperature=temperature,
            chain=made_from(ctx.store, {name: (s.kind, ctx.keys[s.name]) for name, s in self.inputs.items()}),
            windows=loaded.windows,
            ngrams=loaded.model.ngrams.shape if loaded.model.ngrams else None,
        )
