"""A byte-level BPE learned from the corpus."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from tokenizers import Tokenizer

from pipeline.bpe import FAST, TokenizerConfig, learn
from pipeline.errors import DataError
from pipeline.faults import fault_point
from pipeline.stage import Context, Stage
from pipeline.stages.corpus import Corpus
from pipeline.tokens import encode_documents, load_tokenizer, panics

TOLD_EVERY = 256
HOLD_OUT_EVERY = 100
HOLD_OUT_CHARS = 1 << 20


@dataclass(frozen=True)
class TokenizerFile:
    """A `tokenizer.json`, which transformers' PreTrainedTokenizerFast reads too."""

    path: Path

    @property
    def file(self) -> Path:
        return self.path / "tokenizer.json"

    @cached_property
    def vocab_size(self) -> int:
        """How many ids there are, special tokens included."""
        return self.load().get_vocab_size()

    def load(self) -> Tokenizer:
        """The tokenizer, set to read special tokens in a text as ordinary characters."""
        return load_tokenizer(self.file)


@dataclass(frozen=True, kw_only=True)
class TokenizerStage(Stage[TokenizerFile]):
    """Learn a vocabulary from the corpus."""

    config: TokenizerConfig
    corpus: Stage[Corpus]

    def run(self, ctx: Context) -> None:
        corpus = ctx.open(self.corpus)
        sample: list[str] = []
        with panics("the vocabulary cannot be learned"):
            tokenizer, engine = learn(partial(_training_texts, ctx, corpus, sample), self.config, ctx.work, ctx.cpus)
        fault_point("tokenizer.save")
        tokenizer.save(str(ctx.out / "tokenizer.json"))
        economy = _economy(tokenizer, sample or _first_texts(corpus))
        ctx.notes["metrics"] = {"vocab_size": float(tokenizer.get_vocab_size()), **economy}
        by = "" if engine == FAST else f", learned by {engine}"
        size, length = tokenizer.get_vocab_size(), economy["bytes_per_token"]
        ctx.notes["headline"] = f"{size:,} tokens, {length:.2f} bytes a token{by}"
        ctx.notes["datasets"] = [ctx.dataset(self.corpus, "corpus")]
        ctx.notes["model"] = {"role": "tokenizer"}

    def load(self, path: Path) -> TokenizerFile:
        return TokenizerFile(path)


def _training_texts(ctx: Context, corpus: Corpus, sample: list[str]) -> Iterator[str]:
    """The documents to learn from. Every hundredth goes into `sample` instead, until that has a mebibyte."""
    sample.clear()
    sampled = 0
    for number, text in enumerate(corpus.documents(), start=1):
        if number % TOLD_EVERY == 0:
            ctx.tracker.progress(number, corpus.n_documents, "reading words")
        if number % HOLD_OUT_EVERY == 0 and sampled < HOLD_OUT_CHARS:
            sample.append(text)
            sampled += len(text)
        else:
            yield text
    ctx.tracker.progress(corpus.n_documents, corpus.n_documents, "merging pairs")


def _first_texts(corpus: Corpus) -> list[str]:
    """What to measure on where the corpus is too small to hold anything out."""
    return [text for text, _ in zip(corpus.documents(), range(HOLD_OUT_EVERY), strict=False)]


def _economy(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    tokens = sum(len(ids) - 2 for ids in encode_documents(tokenizer, texts))
    n_bytes = sum(len(text.encode()) for text in texts)
    words = sum(len(text.split()) for text in texts)
    if not tokens or not words:
        raise DataError("the corpus has no words to measure the tokenizer on")
    return {"bytes_per_token": n_bytes / tokens, "fertility": tokens / words}
