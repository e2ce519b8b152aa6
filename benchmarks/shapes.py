"""The two model shapes of the speed benchmarks, for us and for the rivals, and rows of tokens to train them on."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import ModelConfig
from pipeline.token_stream import TokenStream

SHAPES = {
    "10M": {"vocab_size": 8192, "d_model": 256, "n_layers": 8, "n_heads": 8, "d_ff": 704},
    "50M": {"vocab_size": 16384, "d_model": 512, "n_layers": 12, "n_heads": 8, "d_ff": 1408},
}
SEQ_LEN, ROWS = 512, 8
"""Tokens of a row, and rows of a micro batch; a step has one."""


def ours(shape: str) -> ModelConfig:
    fields: dict[str, Any] = SHAPES[shape]
    return ModelConfig(n_kv_heads=fields["n_heads"], seq_len=SEQ_LEN, **fields)


def llama(shape: str) -> Any:
    """The same model for transformers, with the attention that is fastest there."""
    from transformers import LlamaConfig

    fields = SHAPES[shape]
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        hidden_size=fields["d_model"],
        num_hidden_layers=fields["n_layers"],
        num_attention_heads=fields["n_heads"],
        intermediate_size=fields["d_ff"],
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )


def litgpt(shape: str) -> Any:
    """The same model for litgpt."""
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]

    fields = SHAPES[shape]
    return Config(
        name=shape,
        vocab_size=fields["vocab_size"],
        padded_vocab_size=fields["vocab_size"],
        n_embd=fields["d_model"],
        n_layer=fields["n_layers"],
        n_head=fields["n_heads"],
        n_query_groups=fields["n_heads"],
        intermediate_size=fields["d_ff"],
        block_size=SEQ_LEN,
        bias=False,
        rotary_percentage=1.0,
        parallel_residual=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )


def tokens(shape: str, rows: int = 256) -> torch.Tensor:
    """Rows of one document each, int64 [rows, SEQ_LEN + 1]: nobody can gain by a document mask."""
    size = SHAPES[shape]["vocab_size"]
    return torch.from_numpy(np.random.default_rng(0).integers(3, size, (rows, SEQ_LEN + 1)))


def stream(shape: str, folder: Path) -> TokenStream:
    """The same tokens as a split of shards, in `folder`."""
    flat = tokens(shape)[:, :-1].numpy().astype("<u2").ravel()
    flat.tofile(folder / "train-00000.bin")
    np.save(folder / "train.documents.npy", np.append(np.arange(0, len(flat), SEQ_LEN), len(flat)))
    return TokenStream(
        path=folder,
        name="train",
        dtype="<u2",
        shards=(("train-00000.bin", len(flat)),),
        n_documents=len(flat) // SEQ_LEN,
        n_bytes=4 * len(flat),
    )


def documents(shape: str, count: int = 4096) -> list[np.ndarray]:
    """Token ids of texts of very different lengths, median 60, as classifiers meet them; int32."""
    random = np.random.default_rng(1)
    lengths = np.clip(np.exp(random.normal(np.log(60), 0.8, count)), 5, SEQ_LEN).astype(int)
    return [random.integers(3, SHAPES[shape]["vocab_size"], n).astype(np.int32) for n in lengths]
