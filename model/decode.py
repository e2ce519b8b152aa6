"""The forward pass of generation: `LanguageModel`'s logits from weights laid out for a few new tokens at a time.

Matrices that read the same input are one, norms' weights are folded into them, and rotation is one complex product. On
a CPU a few tokens go through all layers in one call (`native/decode.cpp`); prompts, a GPU, and a machine without a
compiler take PyTorch's operators. Keys and values are kept in room that is taken once. Each read adds some tokens to
every row of a batch; which of the kept tokens each of them sees is the caller's to say, so that the branches of a
search need not each have a row.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from model import native, rope
from model.config import ModelConfig
from model.decoder import Block
from model.heads import LanguageModel
from model.linear import Matrix, rounded

Tokens = Int64[Tensor, "rows new"]
Forbidden = Bool[Tensor, "#rows 1 1 new all"]


FEW = 32
"""New tokens up to which reading weights is most of the work. Of more the products are, which PyTorch has faster."""


class Layer(NamedTuple):
    """The products of a block."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, eq=False)
class Frozen:
    """A language model's weights as `Decoding` wants them. What is computed has the dtype of `embed`."""

    cfg: ModelConfig
    embed: Float[Tensor, "vocab d_model"]
    layers: list[Layer]
    head: Matrix

    @cached_property
    def table(self) -> Int64[Tensor, "matrices 3"]:
        """Addresses of every matrix and its scales, and its kind, as `native/decode.cpp` has them."""
        kinds = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
        matrices = [matrix for layer in self.layers for matrix in layer] + [self.head]
        return torch.tensor(
            [
                (m.weight.data_ptr(), 0 if m.scales is None else m.scales.data_ptr(), kinds[m.weight.dtype])
                for m in matrices
            ]
        )


@torch.no_grad()
def freeze(model: LanguageModel | Frozen, dtype: torch.dtype | None = None) -> Frozen:
    """A copy of the weights; an embedding that has the dtype already is shared. None keeps the dtype.

    Raises ValueError for a body that reads both ways. int8 rounds the matrices of blocks and head, of which a CPU reads
    a quarter then, and computes in bfloat16. What is frozen already is given back, so that who generates often freezes
    once.
    """
    if isinstance(model, Frozen):
        return model
    cfg, body = model.cfg, model.body
    if not cfg.causal:
        raise ValueError("causal=False cannot be read token by token: those to come would change what was read")
    dtype = dtype or body.embed.weight.dtype
    matrix = rounded if dtype == torch.int8 else lambda weight: Matrix(weight.to(dtype, copy=True))
    layers: list[Layer] = []
    for block in body.blocks:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        q = _pairs_together(attention.q_proj.weight, cfg.head_dim) * cfg.head_dim**-0.5
        k = _pairs_together(attention.k_proj.weight, cfg.head_dim)
        qkv = torch.cat([q, k, attention.v_proj.weight]) * block.attention_norm.weight
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * block.mlp_norm.weight
        layers.append(Layer(*map(matrix, (qkv, attention.o_proj.weight, gate_up, mlp.down_proj.weight))))
    embed = body.embed.weight.to(torch.bfloat16 if dtype == torch.int8 else dtype)
    return Frozen(cfg, embed, layers, matrix(model.head.weight * body.norm.weight))


def _pairs_together(weight: Tensor, head_dim: int) -> Tensor:
    """Channel i of each head beside channel i + head_dim / 2, with which it turns: of q and k alike, so q @ k stays."""
    heads = weight.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)


class Decoding:
    """Keys and values of some rows of text, and the reading of more. `length` tokens of each row are kept."""

    def __init__(self, frozen: Frozen, rows: int, room: int) -> None:
        cfg, like = frozen.cfg, frozen.embed
        self._frozen, self.room, self.length = frozen, room, 0
        self._kept = like.new_empty(cfg.n_layers, 2, rows, cfg.n_kv_heads, room, cfg.head_dim)
        angles = rope.angles(torch.arange(room, device=like.device)[None], cfg.head_dim, cfg.rope_theta)[0]
        self._turns = torch.complex(angles.cos(), angles.sin())

    @torch.inference_mode()
    def read(
        self, tokens: Tokens, positions: slice | None = None, forbidden: Forbidden | None = None, last: int = 1
    ) -> Float[Tensor, "rows last vocab"]:
        """Logits, float32 or wider, of what follows the `last` of these tokens, which are kept after those before.

        `positions` of the tokens in their texts are those of the kept ones where not given; a slice of length 1 is for
        all. `forbidden` is True where a token must not see a kept or new one; None lets it see all that are before it.
        Up to FEW tokens in all, on a CPU, pass through the layers in float32 whatever the weights are, more of them in
        the dtype of `embed`: below float32, logits differ by that rounding.
        """
        cfg, new = self._frozen.cfg, tokens.shape[1]
        if self.length + new > self.room:
            raise ValueError(f"room={self.room} is too small for {self.length} tokens that are kept and {new} more")
        here = slice(self.length, self.length + new)
        turns = self._turns[positions or here]
        if forbidden is None and (new > 1 or cfg.sliding_window is not None):
            forbidden = self.later(new)
        read = self._read_few if tokens.numel() <= FEW and native.takes(self._frozen.embed) else self._read
        logits = read(tokens, turns, here, forbidden, last)
        self.length = here.stop
        return logits

    def _read(self, tokens: Tokens, turns: Tensor, here: slice, forbidden: Forbidden | None, last: int) -> Tensor:
        cfg, x = self._frozen.cfg, embedding(tokens, self._frozen.embed)
        with torch.autocast(tokens.device.type, enabled=False):  # the weights say what is computed in
            for layer, (keys, values) in zip(self._frozen.layers, self._kept, strict=True):
                qkv = layer.qkv(_normed(x, cfg)).unflatten(-1, (-1, cfg.head_dim))
                x = x + layer.out(_attend(qkv, turns, forbidden, keys, values, here))
                gate, up = layer.gate_up(_normed(x, cfg)).chunk(2, dim=-1)
                x = x + layer.down(silu(gate) * up)
            return self._frozen.head(_normed(x[:, -last:], cfg)).to(torch.promote_types(x.dtype, torch.float32))

    def _read_few(
        self, tokens: Tokens, turns: Tensor, here: slice, forbidden: Forbidden | None, last: int
    ) -> Float32[Tensor, "rows last vocab"]:
        """What `_read` does, in one call instead of a dozen a layer."""
        frozen, cfg, (rows, new) = self._frozen, self._frozen.cfg, tokens.shape
        assert turns.shape[0] in (1, new)
        assert last <= new
        x = embedding(tokens, frozen.embed).float()
        stride = 0
        if forbidden is not None:
            forbidden = forbidden.expand(-1, 1, 1, new, here.stop).contiguous()
            stride = new * here.stop if len(forbidden) > 1 else 0
        logits = x.new_empty(rows, last, len(frozen.head.weight))
        place = (torch.view_as_real(turns), cfg.head_dim * (len(turns) > 1), forbidden, stride)
        sizes = (rows, new, last, len(frozen.layers), cfg.d_model, cfg.n_heads, cfg.n_kv_heads, cfg.head_dim, cfg.d_ff)
        kept = (self._kept, self._kept.dtype == torch.bfloat16)
        native.call(
            "read_few",
            frozen.table,
            x,
            *place,
            *kept,
            logits,
            cfg.norm_eps,
            *sizes,
            cfg.vocab_size,
            self.room,
            self.length,
        )
        return logits

    def later(self, new: int) -> Forbidden:
        """What new tokens must not see of the kept ones and of each other: what comes later, or lies too far."""
        everything = torch.arange(self.length + new, device=self._turns.device)
        behind = everything[self.length :, None] - everything
        window = self._frozen.cfg.sliding_window
        unseen = behind < 0 if window is None else (behind < 0) | (behind >= window)
        return unseen[None, None, None]


def _normed(x: Tensor, cfg: ModelConfig) -> Tensor:
    return rms_norm(x, x.shape[-1:], eps=cfg.norm_eps)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary embedding of channels 2i and 2i + 1 as the parts of a complex number, in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    return torch.view_as_real(torch.view_as_complex(wide) * turns).flatten(-2).to(x.dtype)


def _attend(qkv: Tensor, turns: Tensor, forbidden: Tensor | None, keys: Tensor, values: Tensor, here: slice) -> Tensor:
    """What the new tokens mix, [rows, new, heads * head_dim]; their own keys and values are kept `here`.

    The query heads that share a key head are rows of one product.
    """
    kv_heads, new = keys.shape[1], qkv.shape[1]
    turned = _turned(qkv[:, :, :-kv_heads], turns)
    q = turned[:, :, :-kv_heads].unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
    keys[:, :, here] = turned[:, :, -kv_heads:].transpose(1, 2)
    values[:, :, here] = qkv[:, :, -kv_heads:].transpose(1, 2)
    scores = q.flatten(2, 3) @ keys[:, :, : here.stop].mT
    if forbidden is not None:
        scores = scores.unflatten(2, (-1, new)).masked_fill(forbidden, float("-inf")).flatten(2, 3)
    mixed = scores.softmax(dim=-1) @ values[:, :, : here.stop]
    return mixed.unflatten(2, (-1, new)).permute(0, 3, 1, 2, 4).flatten(2)
