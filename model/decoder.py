"""A pre-norm transformer without a head: tokens in, hidden states out; with causal=False it reads both ways."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.utils.checkpoint import checkpoint

from model import attention, documents, rope
from model.config import ModelConfig
from model.dropout import add_dropped, drop
from model.linear import Linear, matmul_dtype
from model.masks import Pattern
from model.mlp import SwiGLU
from model.norm import RMSNorm
from model.rope import Rotation

Hidden = Float[Tensor, "batch seq d_model"]
Keys = Int64[Tensor, " batch"]
Places = Int64[Tensor, " places"]
Output = Float[Tensor, "rows places d_model"]
"""Of the places that are wanted, as a single row; of all of them as they came, if none are named."""


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with rotary positions."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.head_dim = cfg.head_dim
        self.attend = attention.kernel(cfg.attention)
        self.q_proj = Linear(cfg.d_model, cfg.n_heads * cfg.head_dim)
        self.k_proj = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim)
        self.v_proj = Linear(cfg.d_model, cfg.n_kv_heads * cfg.head_dim)
        self.o_proj = Linear(cfg.n_heads * cfg.head_dim, cfg.d_model)

    def forward(self, x: Hidden, rotation: Rotation, pattern: Pattern, only: Places | None = None) -> Output:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
        return self.o_proj(_taken(self.attend(q, k, v, pattern).flatten(-2), only))


class Block(nn.Module):
    """Attention, then the MLP, each reading a normalised residual stream and adding to it."""

    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, cfg.dropout
        self.attention_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attention = Attention(cfg)
        self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.mlp = SwiGLU(cfg.d_model, cfg.d_ff)

    def forward(
        self,
        x: Hidden,
        rotation: Rotation,
        pattern: Pattern,
        dropout_keys: Keys | None = None,
        only: Places | None = None,
    ) -> Output:
        site = 1 + 2 * self.layer  # 0 is the embedding's
        dtype = matmul_dtype(x)  # cast once for all that read it
        attended = self.attention(self.attention_norm(x, dtype), rotation, pattern, only)
        x = add_dropped(_taken(x, only), attended, self.dropout, dropout_keys, site)
        read = self.mlp(self.mlp_norm(x, dtype))
        return add_dropped(x, read, self.dropout, dropout_keys, site + 1)


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)

    def forward(
        self,
        tokens: Int64[Tensor, "batch seq"],
        document_ids: Int[Tensor, "batch seq"] | None = None,
        *,
        dropout_keys: Keys | None = None,
        only: Places | None = None,
    ) -> Output:
        """Hidden states after the final norm. Nothing here waits for the device (the flash kernel does, once).

        A token sees only its own document, whose positions count from 0; without `document_ids` a row is one document.
        Without `dropout_keys` there is no dropout: the model has no train or eval mode.

        `only` are places of the flattened [batch * seq] whose states are wanted, each once: they come back as one row,
        [1, places, d_model], and the last block reads all but, without dropout, computes its output for them alone.

        With cfg.activation_checkpointing (arXiv:1604.06174), where gradients are wanted, autograd keeps the input of
        each block alone and runs the block again in the backward pass: same values, same gradients.
        """
        pattern = Pattern(
            batch=tokens.shape[0],
            seq=tokens.shape[1],
            device=tokens.device,
            causal=self.cfg.causal,
            sliding_window=self.cfg.sliding_window,
            document_ids=document_ids,
        )
        rotation = rope.rotation(_positions(pattern), self.cfg.head_dim, self.cfg.rope_theta)
        keys = dropout_keys if self.cfg.dropout > 0 else None
        x = drop(self.embed(tokens), self.cfg.dropout, keys, site=0)
        recomputed = self.cfg.activation_checkpointing and torch.is_grad_enabled()
        early = only if keys is None else None  # a mask of dropout is of all places
        for block in self.blocks:
            run = partial(_run_again_in_backward, block) if recomputed else block
            x = run(x, rotation, pattern, keys, early if block is self.blocks[-1] else None)
        return self.norm(x if keys is None else _taken(x, only))


def _taken(x: Hidden, only: Places | None) -> Output:
    """Some places of all rows, as one row. By the operator whose gradient on a CPU is fast: indexing has a slow one."""
    return x if only is None else embedding(only[None], x.flatten(0, 1))


def _run_again_in_backward(block: nn.Module, *inputs: Any) -> Output:
    """The block's output, of which autograd keeps the inputs alone.

    No generator's state is kept either: dropout is a function of its keys, so it falls the same way the second time.
    """
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


def _positions(pattern: Pattern) -> Int64[Tensor, "#batch seq"]:
    if pattern.document_ids is None:
        return torch.arange(pattern.seq, device=pattern.device)[None]
    return documents.positions(pattern.document_ids)
