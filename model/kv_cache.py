"""The keys and values of tokens already read, so that generating one more token costs one token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

New = Float[Tensor, "batch new n_kv_heads head_dim"]
All = Float[Tensor, "batch all n_kv_heads head_dim"]


class KVCache:
    """Room for `max_len` tokens of every layer, taken when the first ones come, in their dtype and on their device.

    `length` tokens are held. It is a Python integer, so that reading it never waits for the device.
    """

    def __init__(self, n_layers: int, max_len: int) -> None:
        self.max_len = max_len
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers
        self._document_ids: Tensor | None = None

    def append(self, layer: int, k: New, v: New) -> tuple[All, All]:
        """Store the new tokens of one layer; return all of its keys and values, old and new."""
        room = self._layers[layer] or (self._allocate(k), self._allocate(v))
        self._layers[layer] = room
        end = self.length + k.shape[1]
        room[0][:, self.length : end], room[1][:, self.length : end] = k, v
        return room[0][:, :end], room[1][:, :end]

    def extend_ids(self, ids: Int[Tensor, "batch new"] | None) -> Int[Tensor, "batch all"] | None:
        """The document ids of all tokens, given those of the new ones: on every call, or on none (ValueError)."""
        if self.length and (ids is None) != (self._document_ids is None):
            raise ValueError("document_ids must be given on every call that uses this cache, or on none")
        if ids is not None:
            held = ids[:, :0] if self._document_ids is None else self._document_ids
            self._document_ids = torch.cat([held, ids], dim=1)
        return self._document_ids

    def check_room(self, n_tokens: int) -> None:
        """Raise ValueError if `n_tokens` more do not fit."""
        if self.length + n_tokens > self.max_len:
            raise ValueError(f"max_len={self.max_len} is too small for {self.length} cached and {n_tokens} new tokens")

    def advance(self, n_tokens: int) -> None:
        """Count the tokens that every layer has now stored."""
        self.length += n_tokens

    def _allocate(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[0], self.max_len, *x.shape[2:])
