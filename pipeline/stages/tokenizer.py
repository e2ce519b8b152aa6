"""A byte-level BPE learned from the corpus."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipeline.errors import DataError
from pipeline.faults import fault_point
from pipeline.stage import Context, Stage
from pipeline.stages.corpus import Corpus
from pipeline.tokens import BOS, BOS_ID, EOS, EOS_ID, PAD, encode_documents, load_tokenizer, panics

BATCH_DOCUMENTS = 256
HOLD_OUT_EVERY = 100
HOLD_OUT_CHARS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How the vocabulary is learned."""

    vocab_size: Annotated[int, Ge(259), Le(1 << 20)] = 16384
    """Tokens at most: 3 special ones, 256 bytes, and merges. A small corpus may not have enough pairs to fill it."""
    lowercase: bool = False
    """Read and write lower case only. The text that a model generates then has no capitals."""
    min_frequency: Annotated[int, Ge(1)] = 2
    """Merge no pair that is seen less often."""


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
        tokenizer = blank_tokenizer(lowercase=self.config.lowercase)
        with panics("the vocabulary cannot be learned"):
            tokenizer.train_from_iterator(_training_batches(ctx, corpus, sample), _trainer(self.config))
        fault_point("tokenizer.save")
        tokenizer.save(str(ctx.out / "tokenizer.json"))
        economy = _economy(tokenizer, sample or _first_texts(corpus))
        ctx.notes["metrics"] = {"vocab_size": float(tokenizer.get_vocab_size()), **economy}
        ctx.notes["headline"] = f"{tokenizer.get_vocab_size():,} tokens, {economy['bytes_per_token']:.2f} bytes a token"
        ctx.notes["datasets"] = [ctx.dataset(self.corpus, "corpus")]
        ctx.notes["model"] = {"role": "tokenizer"}

    def load(self, path: Path) -> TokenizerFile:
        return TokenizerFile(path)


def blank_tokenizer(*, lowercase: bool) -> Tokenizer:
    """A byte-level BPE with no merges yet, which puts bos and eos around a text."""
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    # the first word of a text is written as the same word elsewhere is: with a space before it
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
    )
    return tokenizer


def _trainer(config: TokenizerConfig) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )


def _training_batches(ctx: Context, corpus: Corpus, sample: list[str]) -> Iterator[list[str]]:
    """The documents to learn from. Every hundredth goes into `sample` instead, until that has a mebibyte."""
    batch: list[str] = []
    sampled = 0
    for number, text in enumerate(corpus.documents(), start=1):
        if number % HOLD_OUT_EVERY == 0 and sampled < HOLD_OUT_CHARS:
            sample.append(text)
            sampled += len(text)
            continue
        batch.append(text)
        if len(batch) == BATCH_DOCUMENTS:
            ctx.tracker.progress(number, corpus.n_documents, "reading words")
            yield batch
            batch = []
    ctx.tracker.progress(corpus.n_documents, corpus.n_documents, "merging pairs")
    yield batch


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
