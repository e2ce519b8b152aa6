"""A language model of somebody else's to start from: its tokenizer and its weights, each in our own form."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from model.interchange import read_body, read_config
from pipeline import sources, weights
from pipeline.errors import DataError
from pipeline.identity import knob
from pipeline.publish import combined
from pipeline.stage import Context, Stage
from pipeline.stages.tokenizer import TokenizerFile
from pipeline.tokens import TOKENIZER_FILES, import_tokenizer
from pipeline.weights import CONFIG, LanguageModelFiles, write_language_model

LLAMA_CONFIG = "config.json"
MODEL_FILES = (LLAMA_CONFIG, CONFIG, "model*.safetensors")


def model_config(folder: str) -> ModelConfig:
    """The shape of the model in a Hugging Face folder, or in one of our own such as an ONNX export.

    Raises DataError for one that cannot be read or computed.
    """
    if _is_ours(folder):
        return LanguageModelFiles(Path(folder)).config
    try:
        return read_config(Path(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"init_from={folder}: {error}. Give a folder in the Llama layout of transformers") from None


@dataclass(frozen=True, kw_only=True)
class ImportTokenizer(Stage[TokenizerFile]):
    """Takes over a tokenizer.json, and makes it put a first and a last token around every text."""

    folder: str = knob()

    def sources(self) -> Mapping[str, str]:
        if not (Path(self.folder) / TOKENIZER_FILES[0]).is_file():
            raise DataError(
                f"init_from={self.folder}: holds no {TOKENIZER_FILES[0]}. A fast tokenizer writes it: "
                f"transformers.AutoTokenizer.from_pretrained({self.folder!r}).save_pretrained({self.folder!r})"
            )
        return sources.folder_digests(self.folder, TOKENIZER_FILES)

    def run(self, ctx: Context) -> None:
        tokenizer = import_tokenizer(Path(self.folder))
        tokenizer.save(str(ctx.out / "tokenizer.json"))
        ctx.notes["metrics"] = {"vocab_size": float(tokenizer.get_vocab_size())}
        ctx.notes["headline"] = f"{tokenizer.get_vocab_size():,} tokens of {Path(self.folder).name}"
        ctx.notes["files"] = ["tokenizer.json"]
        ctx.notes["datasets"] = [_described(self.folder, self.sources())]

    def load(self, path: Path) -> TokenizerFile:
        return TokenizerFile(path)


@dataclass(frozen=True, kw_only=True)
class ImportModel(Stage[LanguageModelFiles]):
    """Takes over the weights of a language model, or of the body of a classifier, as float32."""

    folder: str = knob()
    model: ModelConfig
    tokenizer: Stage[TokenizerFile]

    def sources(self) -> Mapping[str, str]:
        return sources.folder_digests(self.folder, MODEL_FILES)

    def run(self, ctx: Context) -> None:
        tokenizer = ctx.open(self.tokenizer)
        highest = max(tokenizer.load().get_vocab(with_added_tokens=True).values())
        if highest >= self.model.vocab_size:
            raise DataError(
                f"init_from={self.folder}: the tokenizer has the id {highest}, the model only {self.model.vocab_size} "
                "rows of embedding; they do not belong together"
            )
        try:
            read = weights.read_body if _is_ours(self.folder) else read_body
            language_model = read(Path(self.folder), self.model).float()
        except (OSError, ValueError) as error:
            raise DataError(f"init_from={self.folder}: {error}") from None
        write_language_model(ctx.out, dict(language_model.named_parameters()), self.model, tokenizer.file)
        size = sum(p.numel() for p in language_model.parameters())
        ctx.notes["metrics"] = {"parameters": float(size)}
        ctx.notes["headline"] = f"{size:,} parameters of {Path(self.folder).name}"
        ctx.notes["model"] = {"role": "base"}
        ctx.notes["datasets"] = [_described(self.folder, self.sources())]

    def load(self, path: Path) -> LanguageModelFiles:
        return LanguageModelFiles(path)


def _described(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    digest = combined({name: {"blake3": value} for name, value in files.items()})
    return sources.described(folder, digest, "init_from")


def _is_ours(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file() and not (Path(folder) / LLAMA_CONFIG).is_file()
