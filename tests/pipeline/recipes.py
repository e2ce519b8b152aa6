"""Recipes of fine-tuning for tests."""

from typing import Any

SIMPLE: dict[str, Any] = {
    "optimizer": "adamw",
    "head_lr": None,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "warmup": 0.02,
    "floor": 0.1,
    "epochs": 3,
    "min_steps": 0,
    "metric_for_best_model": "macro_f1",
    "batch_size": 32,
    "pooling": "last",
    "class_weights": "none",
    "average": 0.0,
}
"""What is quick on a toy, may be cut by ZeRO, and has a stock form."""
