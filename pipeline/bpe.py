"""Learning the merges of a byte-level BPE by the fastest engine that learns what `tokenizers` does, the judge."""

import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from annotated_types import Ge, Le
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from pipeline.encoder import prepared
from pipeline.tokens import BOS, BOS_ID, EOS, EOS_ID, PAD

log = logging.getLogger("gristmill")

FAST, REFERENCE = "gigabpe", "tokenizers"
JUDGED_CHARS, JUDGED_VOCAB = 1 << 20, 2048
"""Of the first texts, and the vocabulary that both engines learn from them before the faster one is trusted."""
SPECIAL_TOKENS = [BOS, EOS, PAD]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
END = " \0\n"
"""Stands after each text in the file that the fast engine reads, which it does line by line. The pre-tokenizer makes a
word of the NUL, whatever is before it, so that all other words are those of the texts; the one merge that it causes is
taken out again. No text of a corpus holds a NUL, see `pipeline.text.normalise`."""
NEWLINE, STANDS_FOR_IT = "\n", "\v"
"""Within a text. The next byte is a space too, and takes its place in every order, where no text holds one."""


def _symbols(text: str) -> str:
    """The bytes of a text as a byte-level BPE writes them."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0]


_END_PAIR = tuple(_symbols(END[:2]))
_BACK = str.maketrans(_symbols(STANDS_FOR_IT), _symbols(NEWLINE))


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How the vocabulary is learned."""

    vocab_size: Annotated[int, Ge(259), Le(1 << 20)] = 16384
    """Tokens at most: 3 special ones, 256 bytes, and merges. A small corpus may not have enough pairs to fill it."""
    lowercase: bool = False
    """Read and write lower case only. The text that a model generates then has no capitals."""
    min_frequency: Annotated[int, Ge(1)] = 2
    """Merge no pair that is seen less often."""


def blank_tokenizer(*, lowercase: bool) -> Tokenizer:
    """A byte-level BPE with no merges yet, which puts bos and eos around a text."""
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    # the first word of a text is written as the same word elsewhere is: with a space before it
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
    )
    return tokenizer


class Unsuited(Exception):
    """The fast engine would learn something else from these texts."""


Texts = Callable[[], Iterable[str]]
"""All texts from the first, each time that it is called."""


def learn(texts: Texts, config: TokenizerConfig, work: Path, threads: int) -> tuple[Tokenizer, str]:
    """The tokenizer that `tokenizers` would train, and the engine that did. `work` is a folder for scratch files."""
    if importlib.util.find_spec(FAST) is None:
        log.info(
            "%s learns the vocabulary: %s is not installed; `pip install gristmill[fast]` adds it", REFERENCE, FAST
        )
        return by_reference(texts(), config), REFERENCE
    try:
        with ThreadPoolExecutor(1) as aside:  # one of the two leaves cores idle while the other is at work
            verdict = aside.submit(_judge, list(_first_chars(texts(), JUDGED_CHARS)), config, work, threads)
            found = by_fast(texts(), config, work, threads)
            verdict.result()
        return found, FAST
    except Unsuited as reason:
        log.warning("%s learns the vocabulary: %s", REFERENCE, reason)
        return by_reference(texts(), config), REFERENCE


def _judge(texts: Sequence[str], config: TokenizerConfig, work: Path, threads: int) -> None:
    small = replace(config, vocab_size=min(config.vocab_size, JUDGED_VOCAB))
    with TemporaryDirectory(dir=work) as place:  # `work` itself holds the file of all texts meanwhile
        found = by_fast(texts, small, Path(place), threads)
    if by_reference(texts, small).to_str() != found.to_str():
        raise Unsuited(f"{FAST} gives other merges for the first texts")


def _first_chars(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit -= len(text)
        if limit <= 0:
            return


def by_reference(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """By `tokenizers`."""
    tokenizer = blank_tokenizer(lowercase=config.lowercase)
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=ALPHABET,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def by_fast(texts: Iterable[str], config: TokenizerConfig, work: Path, threads: int) -> Tokenizer:
    """By gigabpe, out of a file with a text a line, each as the pre-tokenizer is to see it. Raises Unsuited."""
    from gigabpe import train_bpe  # pyright: ignore[reportAttributeAccessIssue]

    file = work / "texts.txt"
    try:
        with file.open("w", encoding="utf-8", newline="") as out:
            for text in texts:
                if STANDS_FOR_IT in text or END[1] in text:
                    raise Unsuited("a text holds a vertical tab or a NUL")
                out.write(prepared(config.lowercase, True, text).replace(NEWLINE, STANDS_FOR_IT) + END)
        _, merges = train_bpe(
            [str(file)],
            config.vocab_size + 1,
            special_tokens=SPECIAL_TOKENS,
            min_frequency=config.min_frequency,
            pretokenizer="bytelevel",
            threads=threads,
        )
    finally:
        file.unlink(missing_ok=True)
    pairs = [(left.translate(_BACK), right.translate(_BACK)) for left, right in merges]
    vocab, kept = _vocabulary(pairs, config.vocab_size)
    tokenizer = blank_tokenizer(lowercase=config.lowercase)
    tokenizer.model = models.BPE(vocab, kept)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def _vocabulary(merges: Sequence[tuple[str, str]], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids as `tokenizers` gives them: special tokens, all bytes whether seen or not, then a token for each merge."""
    vocab = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *ALPHABET])}
    kept: list[tuple[str, str]] = []
    for pair in merges:
        if len(vocab) >= size:
            break
        if pair != _END_PAIR:
            vocab.setdefault("".join(pair), len(vocab))
            kept.append(pair)
    return vocab, kept
