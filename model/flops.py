"""Parameters and matrix-multiply FLOPs of a config, on paper: nothing is built."""

from model.config import ModelConfig


def parameters(cfg: ModelConfig) -> int:
    """Parameters of a LanguageModel, norms included; tied embeddings count once."""
    norms = (2 * cfg.n_layers + 1) * cfg.d_model
    matrices = 1 if cfg.tie_embeddings else 2
    return cfg.n_layers * _block_weights(cfg) + norms + matrices * cfg.vocab_size * cfg.d_model


def matmul_flops_per_token(cfg: ModelConfig, seq_len: int, target_share: float = 1.0) -> float:
    """FLOPs (2 per multiply-add) of one token's forward pass, averaged over a document of `seq_len` tokens.

    Counts every matrix product; those of the head and of the last block, from its o on, for `target_share` of the
    tokens, since a loss needs no logits where there is no target. Attention counts only the keys that are seen, so
    causal attention is half of the square. Embedding look-ups, norms and other elementwise work are left out
    (arXiv:2204.02311, appendix B, with the causal half).
    """
    asked = cfg.d_model * (cfg.d_model + 3 * cfg.d_ff) + cfg.vocab_size * cfg.d_model
    weights = cfg.n_layers * _block_weights(cfg) + cfg.vocab_size * cfg.d_model - (1 - target_share) * asked
    scores_and_mix = 2 * cfg.n_layers * cfg.n_heads * cfg.head_dim * _keys_seen(cfg, seq_len)
    return 2.0 * (weights + scores_and_mix)


def training_flops_per_token(cfg: ModelConfig, seq_len: int, target_share: float = 1.0) -> float:
    """FLOPs of one token's forward and backward passes: each product has two more for its two gradients."""
    return 3.0 * matmul_flops_per_token(cfg, seq_len, target_share)


def _block_weights(cfg: ModelConfig) -> int:
    """Weights of the matrices of one block: q and o, k and v, and the three of the MLP."""
    kv_width = cfg.n_kv_heads * cfg.head_dim
    return cfg.d_model * (2 * cfg.d_model + 2 * kv_width + 3 * cfg.d_ff)


def _keys_seen(cfg: ModelConfig, seq_len: int) -> float:
    """Keys a query sees, on average over the document: of the square, a band `reach` wide on one side or on both."""
    reach = min(cfg.sliding_window or seq_len, seq_len)
    one_side = reach - reach * reach / (2 * seq_len)
    return one_side if cfg.causal else 2 * one_side
