"""Does any shortcut of a training step show in the loss? `python -m benchmarks.curves`, half an hour.

One small model learns 300 steps of the quickstart's texts in float32 with nothing fused: a document a row, the
reference attention, all logits at once. Then again with one shortcut more each time, from the same weights over the
same texts; and from two other seeds, whose spread is the noise. Writes benchmarks/loss_curves.png; exits with 1 if the
smoothed loss of a shortcut ever lies further away than the seeds do.
"""

import argparse
import gzip
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.timing import machine
from model import native
from model.batch import IGNORE, Batch, Loss
from model.config import ModelConfig
from model.heads import LanguageModel
from model.init import initialize
from model.objectives import next_token
from pipeline.batches import fill_rows, pack
from pipeline.engine import EngineSettings, create
from pipeline.memory import keep_freed_memory
from pipeline.optimizer import OptimizerConfig
from pipeline.plots import DPI, LIGHT, png

CORPUS = Path("data/quickstart/wordnet-glosses.txt.gz")
PICTURE = Path("benchmarks/loss_curves.png")
VOCAB, SEQ_LEN, DOCUMENTS_A_STEP, STEPS = 4096, 128, 48, 300
SMOOTHING = 0.95
"""What is kept of an exponential mean from step to step."""


@dataclass(frozen=True)
class Run:
    """How one curve is made."""

    name: str
    packed: bool = True
    fused_loss: bool = True
    attention: str = "auto"
    precision: str = "bf16"
    compiled: bool = False
    kernels: bool = False
    seed: int = 0


PLAIN = Run("float32, nothing fused", False, False, "reference", "fp32")
SEEDS = [Run(f"the same, seed {n}", False, False, "reference", "fp32", seed=n) for n in (1, 2)]
SHORTCUTS = [
    Run("+ packed rows", True, False, "reference", "fp32"),
    Run("+ fused cross-entropy", True, True, "reference", "fp32"),
    Run("+ bfloat16 and its attention", True, True, "auto", "bf16"),
    Run("the same, compiled", True, True, "auto", "bf16", compiled=True),
    Run("the same, kernels in C++", True, True, "auto", "bf16", kernels=True),
]


def documents() -> list[np.ndarray]:
    """Token ids of every text, each no longer than a row."""
    with gzip.open(CORPUS, "rt") as lines:
        texts = [line.strip() for line in lines]
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["?", "<end>"]))
    encoded = (np.array([*encoding.ids[: SEQ_LEN - 1], 1]) for encoding in tokenizer.encode_batch(texts))
    return [ids for ids in encoded if len(ids) > 2]


def batches(texts: Sequence[np.ndarray], packed: bool) -> Iterator[Batch]:
    """The same texts in every run, in rows of their own or packed."""
    order = np.random.default_rng(0).permutation(len(texts))[: STEPS * DOCUMENTS_A_STEP]
    for chosen in order.reshape(STEPS, DOCUMENTS_A_STEP):
        own = [texts[i] for i in chosen]
        rows = pack([len(text) for text in own], SEQ_LEN) if packed else [[i] for i in range(len(own))]
        tokens, ids = (torch.from_numpy(x) for x in fill_rows([[own[i] for i in row] for row in rows]))
        follows = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, :-1] = tokens[:, 1:].where(follows, IGNORE)
        yield Batch(tokens, targets, ids)


def unfused(model: LanguageModel, batch: Batch) -> Loss:
    """The loss from all logits at once."""
    logits = model(batch.tokens, batch.document_ids)
    total = cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return Loss(total, (batch.targets != IGNORE).sum())


def curve(run: Run, texts: Sequence[np.ndarray]) -> np.ndarray:
    """Mean loss of each step, in nats a token."""
    native.ENABLED = run.kernels
    cfg = ModelConfig(
        vocab_size=VOCAB,
        d_model=192,
        n_layers=4,
        n_heads=3,
        n_kv_heads=3,
        d_ff=512,
        seq_len=SEQ_LEN,
        attention=run.attention,
    )
    model = LanguageModel(cfg)
    initialize(model, run.seed)
    if run.compiled:
        model.body.compile()
    engine = create(
        "plain",
        model,
        next_token.loss if run.fused_loss else unfused,
        optimizer=OptimizerConfig(name="muon", lr=4e-2, muon_lr=3.6e-3, weight_decay=0.0),
        precision=run.precision,
        grad_clip=1.0,
        settings=EngineSettings(device="cpu"),
        n_layers=cfg.n_layers,
    )
    losses: list[Tensor] = []
    for step, batch in enumerate(batches(texts, run.packed)):
        count = int((batch.targets != IGNORE).sum())
        losses.append(engine.accumulate(batch, count) / count)
        engine.step(min(1.0, (step + 1) / 20))
    engine.close()
    return torch.stack(losses).numpy()


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Exponential mean, with what it lacks at the start made up for."""
    out, mean = np.empty(len(losses)), 0.0
    for step, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        out[step] = mean / (1 - SMOOTHING ** (step + 1))
    return out


def picture(curves: dict[str, np.ndarray], noise: float) -> bytes:
    """The curves over each other, and how far each shortcut is from float32."""
    figure = Figure(figsize=(8.0, 6.4), dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    reference = smoothed(curves[PLAIN.name])
    for run in (PLAIN, *SHORTCUTS):
        values = smoothed(curves[run.name])
        above.plot(values, label=run.name, linewidth=1.2)
        below.plot(values - reference, linewidth=1.2)
    below.axhspan(-noise, noise, color=LIGHT.faint, zorder=0, label="as far as other seeds are")
    above.set(ylabel="loss, nats a token", title="Each shortcut of a training step, added to those before it")
    below.set(ylabel="away from float32", xlabel="step", ylim=(-2 * noise, 2 * noise))
    for ax in (above, below):
        ax.legend(frameon=False, loc="upper right")
        ax.spines[["top", "right"]].set_visible(False)
    return png(figure)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    keep_freed_memory()
    print(machine())
    texts = documents()
    curves: dict[str, np.ndarray] = {}
    for run in (PLAIN, *SEEDS, *SHORTCUTS):
        curves[run.name] = curve(run, texts)
        print(f"{run.name:<30} last loss {smoothed(curves[run.name])[-1]:.4f}", file=sys.stderr, flush=True)
    reference = smoothed(curves[PLAIN.name])
    away = {name: float(np.abs(smoothed(losses) - reference)[20:].max()) for name, losses in curves.items()}
    noise = max(away[run.name] for run in SEEDS)
    print("| step of training | furthest from float32, nats |\n|---|---|")
    for run in (*SEEDS, *SHORTCUTS):
        print(f"| {run.name} | {away[run.name]:.4f} |")
    PICTURE.write_bytes(picture(curves, noise))
    if any(away[run.name] > noise for run in SHORTCUTS):
        sys.exit(1)


if __name__ == "__main__":
    main()
