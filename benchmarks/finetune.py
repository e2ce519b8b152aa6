"""Fine-tuning a classifier on texts of different lengths beside transformers and its Trainer.

`python -m benchmarks.finetune [--shape 10M]`. All train the same Llama with a head for 20 classes, AdamW, 32 texts a
step. The Trainer pads each batch to its longest text, as it does by default; the loop sorts its batches by length.
"""

import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks import shapes
from benchmarks.harness import KEPT_MEMORY, Contender, Race, Turn, command_line
from model.heads import LanguageModel, swap_head
from model.init import initialize
from model.objectives import classification
from pipeline.batches import LabelledSampling
from pipeline.guard import Guard
from pipeline.train import train
from pipeline.training import TrainingConfig, prepare_process

LABELS, TEXTS, LR = 20, 32, 1e-4
STEPS = 8
"""Of a slice; the loop sorts as many batches by length at a time, so that every slice has short texts and long ones."""
GOALS = {"transformers loop bf16, bucketed": 1.6, "Trainer bf16, padded": 3.5}


def ours(turn: Turn, shape: str) -> None:
    prepare_process(torch.get_num_threads())
    cfg, documents = shapes.ours(shape), shapes.documents(shape)
    model = LanguageModel(cfg)
    initialize(model, 0)
    engine = TrainingConfig(lr=LR).create_engine(swap_head(model, LABELS, "last", 0), classification.loss, cfg.n_layers)
    sampling = LabelledSampling(
        documents=documents,
        targets=labels(len(documents)),
        seq_len=shapes.SEQ_LEN,
        documents_per_step=TEXTS,
        micro_batch_size=16,
        seed=0,
    )
    for report in train(engine, sampling, lambda _: 1.0, Guard(engine.device), start=0, stop=10**6):
        if report.step % STEPS == 1:
            turn(STEPS * TEXTS)


def labels(count: int) -> np.ndarray:
    return np.arange(count) % LABELS


def transformers_loop(turn: Turn, shape: str) -> None:
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(_config(shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    documents = shapes.documents(shape)
    step(next(bucketed(documents)))
    for number, batch in enumerate(bucketed(documents)):
        if number % STEPS == 0:  # here, so that a slice is the batches that were sorted together
            turn(STEPS * TEXTS)
        step(batch)


def bucketed(documents: Sequence[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of texts of like length, in random order: the most that padding allows."""
    random, targets = np.random.default_rng(0), labels(len(documents))
    while True:
        order = random.permutation(len(documents))
        for start in range(0, len(order), STEPS * TEXTS):
            pool = sorted(order[start : start + STEPS * TEXTS], key=lambda i: len(documents[i]))
            batches = [pool[first : first + TEXTS] for first in range(0, len(pool), TEXTS)]
            for number in random.permutation(len(batches)):
                yield padded([documents[i] for i in batches[number]], targets[batches[number]])


def padded(documents: Sequence[np.ndarray], targets: np.ndarray) -> dict[str, torch.Tensor]:
    longest = max(map(len, documents))
    ids = np.full((len(documents), longest), 2, dtype=np.int64)
    for row, document in zip(ids, documents, strict=True):
        row[: len(document)] = document
    lengths = np.array([[len(document)] for document in documents])
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy((np.arange(longest) < lengths).astype(np.int64)),
        "labels": torch.from_numpy(targets),
    }


def trainer(turn: Turn, shape: str) -> None:
    from transformers import LlamaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    class TakeTurns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            del args, control, more
            if state.global_step % STEPS == 1:
                turn(STEPS * TEXTS)

    def collate(rows: Sequence[tuple[np.ndarray, int]]) -> dict[str, torch.Tensor]:
        return padded([ids for ids, _ in rows], np.array([label for _, label in rows]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=TEXTS,
            max_steps=10**6,
            learning_rate=LR,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=True,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        documents = shapes.documents(shape)
        Trainer(
            LlamaForSequenceClassification(_config(shape)),
            arguments,
            train_dataset=list(zip(documents, labels(len(documents)).tolist(), strict=True)),  # pyright: ignore[reportArgumentType]
            data_collator=collate,
            callbacks=[TakeTurns()],
        ).train()


def _config(shape: str) -> Any:
    config = shapes.llama(shape)
    config.num_labels, config.pad_token_id = LABELS, 2
    return config


def contenders(shape: str) -> list[Contender]:
    def one(name: str, function: str, env: dict[str, str] | None = None) -> Contender:
        return Contender(name, f"benchmarks.finetune:{function}", {"shape": shape}, env or {})

    return [
        one("gristmill", "ours"),
        one("Trainer bf16, padded", "trainer"),
        one("transformers loop bf16, bucketed", "transformers_loop"),
        one("the same loop, memory kept", "transformers_loop", KEPT_MEMORY),
    ]


def races(shape: str) -> Iterator[Race]:
    yield Race(f"{shape}, texts of 60 tokens in the median", contenders(shape), "texts", GOALS)


if __name__ == "__main__":
    command_line(__doc__, races)
