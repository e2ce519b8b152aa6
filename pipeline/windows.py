"""How a text is read that is longer than the model: in windows of equal length, whose logits are averaged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

Ids = Int32[np.ndarray, " tokens"]

WINDOWS = "reading_windows"
"""Our key in the record or config of a classifier that reads several: `{"count", "overlap"}`."""
N_SPECIAL = 2
"""Tokens around a text, and so around each of its windows."""


@dataclass(frozen=True)
class Windows:
    """At most `count` windows of a text, of which two neighbours share `overlap` tokens of it; one window cuts it."""

    count: int = 1
    overlap: int = 0

    @classmethod
    def of(cls, record: Mapping[str, Any], seq_len: int) -> "Windows":
        """As noted of a classifier that reads `seq_len` tokens. Raises ValueError for what cannot be."""
        if WINDOWS not in record:
            return ONE_WINDOW
        windows = cls(int(record[WINDOWS]["count"]), int(record[WINDOWS]["overlap"]))
        if (reason := windows.refusal(seq_len)) is not None:
            raise ValueError(f"{WINDOWS}: {reason}")
        return windows

    @property
    def record(self) -> dict[str, Any]:
        """What is noted of a classifier that reads so; nothing where it reads one window."""
        return {WINDOWS: {"count": self.count, "overlap": self.overlap}} if self.count > 1 else {}

    def refusal(self, seq_len: int) -> str | None:
        """Why windows of `seq_len` tokens cannot be read so, or None."""
        room = seq_len - N_SPECIAL
        if self.count < 1 or self.overlap < 0:
            return f"count={self.count} must be at least 1, and overlap={self.overlap} at least 0"
        if self.count == 1 or self.overlap < room:
            return None
        return (
            f"window_overlap={self.overlap} must be less than the {room} tokens of a text that a window of "
            f"seq_len={seq_len} holds; set a smaller overlap or a longer seq_len"
        )

    def longest(self, seq_len: int) -> int:
        """Tokens of a text that are read at most, the special ones not counted."""
        return self.count * (seq_len - N_SPECIAL - self.overlap) + self.overlap

    def cut(self, ids: Ids, seq_len: int) -> list[Ids]:
        """The windows of a text that is given with its special tokens, which each of them carries.

        Where several are needed, they are as few as hold the text, and of equal length but for one token, so that none
        is a tiny rest. What comes after the longest text that they can hold is left out.
        """
        if len(ids) <= seq_len or self.count == 1:
            return [shortened(ids, seq_len)]
        text = ids[1:-1][: self.longest(seq_len)]
        new = len(text) - self.overlap
        n = -(-new // (seq_len - N_SPECIAL - self.overlap))
        starts = [i * new // n for i in range(n + 1)]
        return [np.concatenate([ids[:1], text[a : b + self.overlap], ids[-1:]]) for a, b in pairwise(starts)]


ONE_WINDOW = Windows()


def shortened(ids: Ids, seq_len: int) -> Ids:
    """A text cut to `seq_len` tokens by dropping its end, not the eos."""
    return ids if len(ids) <= seq_len else np.concatenate([ids[: seq_len - 1], ids[-1:]])


def mean_over_windows(logits: Float[Tensor, "windows labels"], counts: Sequence[int]) -> Float[Tensor, "texts labels"]:
    """The logits of each text, given those of its windows, `counts` of them a text, text by text.

    The head's score is linear and without a bias, so the mean of the windows' logits is the score of the mean of their
    pooled vectors: averaging logits is mean pooling over windows, and commutes with dividing the head by a temperature.
    """
    return torch.segment_reduce(logits, "mean", lengths=torch.tensor(counts, device=logits.device))


def loss_weights(counts: Sequence[int]) -> Float32[np.ndarray, " windows"] | None:
    """What each window's loss counts, so that every text counts alike, whatever its length; None where all count 1.

    Inverse to the number of windows of its text, and 1 in the mean over all windows.
    """
    n_texts, n_windows = len(counts), sum(counts)
    if n_texts == n_windows:
        return None
    shares = [n_windows / n_texts / count for count in counts]
    return np.repeat(np.array(shares, dtype=np.float32), counts)
