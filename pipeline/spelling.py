"""The bytes that tokens stand for, whatever the vocabulary, and n-grams that read them off token ids."""

import json
from collections.abc import Mapping

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.ngrams import NGrams

MOST_BYTES = 16
"""Of a token that are read; no token of our own vocabularies has more."""


def _byte_alphabet() -> dict[str, int]:
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTES = _byte_alphabet()


def blank_ngrams(shape: Mapping[str, int], n_labels: int, tokenizer: Tokenizer, n_tokens: int) -> NGrams:
    """N-grams of a tokenizer's tokens, and of their bytes, that say nothing yet; `shape` is as of `NGrams.shape`."""
    spelling = spelled(tokenizer, n_tokens) if shape["bytes"] else None
    return NGrams(n_labels, shape["order"], shape["buckets"], spelling, shape["bytes"])


def spelled(tokenizer: Tokenizer, n_tokens: int) -> Tensor:
    """int16 [n_tokens, MOST_BYTES]: the bytes of each token, with -1 behind the last; a special token has none.

    Tokens of more bytes are cut. Where a word begins, there is a space.
    """
    spell = _in_byte_alphabet if _is_byte_level(tokenizer) else _as_written
    special = tokenizer.get_added_tokens_decoder()
    spelling = [b""] * n_tokens
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if number not in special:
            spelling[number] = spell(token)[:MOST_BYTES]
    table = np.frombuffer(b"".join(data.ljust(MOST_BYTES) for data in spelling), np.uint8).reshape(n_tokens, -1)
    lengths = np.array([len(data) for data in spelling])[:, None]
    return torch.from_numpy(np.where(np.arange(MOST_BYTES) < lengths, table.astype(np.int16), np.int16(-1)))


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    own = json.loads(tokenizer.to_str())
    return "ByteLevel" in json.dumps([own["pre_tokenizer"], own["decoder"]])


def _in_byte_alphabet(token: str) -> bytes:
    """Of a byte-level vocabulary, which writes each byte as one character that can be seen (GPT-2)."""
    return bytes(BYTES[each] for each in token) if BYTES.keys() >= set(token) else _as_written(token)


def _as_written(token: str) -> bytes:
    """Of other vocabularies, which mark where a word begins (SentencePiece) or that it goes on (WordPiece)."""
    return token.removeprefix("##").replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
