"""Fine-tuning: the head of a language model is swapped for a classifier, and the whole learns from labelled texts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from tokenizers import Tokenizer

from model.config import ModelConfig
from model.heads import Classifier, LanguageModel, swap_head
from model.init import initialize
from model.objectives import classification, multi_label
from pipeline import checkpoint, lora, metrics
from pipeline.batches import LabelledSampling
from pipeline.classify import document_probabilities, tokenize_windows
from pipeline.engine import Engine
from pipeline.errors import UsageError
from pipeline.identity import added
from pipeline.optimizer import OptimizerConfig
from pipeline.precision import resolve
from pipeline.stage import Context, RankContext, Resources, Stage
from pipeline.stages.labels import Labels
from pipeline.stages.tokenizer import TokenizerFile
from pipeline.targets import Targets, is_multi_label
from pipeline.training import TrainingConfig, TrainingRun, prepare_process
from pipeline.weights import ClassifierFiles, LanguageModelFiles, write_classifier
from pipeline.windows import ONE_WINDOW, Windows, loss_weights

BEST = "best"
"""Folder, beside the checkpoints, of the best epoch so far."""
LORA = {"method": "lora"}


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """How the classifier is trained. The defaults are the recipe of configs/english.yaml but for `bidirectional` and
    `windows`; it was chosen by measurements on several tasks (benchmarks/RESULTS.md).
    """

    lr: Annotated[float, Gt(0), Le(1)] = 1.4e-3
    """Peak learning rate of AdamW."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """adamw, or muon for the blocks' matrices with AdamW for the rest. ZeRO, which cuts matrices, needs adamw."""
    muon_lr: Annotated[float, Gt(0), Le(1)] | None = 2.5e-3
    """Peak learning rate of Muon; null is `lr`."""
    head_lr: Annotated[float, Gt(0), Le(1)] | None = added(2e-2, birth=None)
    """Peak learning rate of the head, which begins with random weights; null is `lr`."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Decoupled weight decay of the blocks' matrices."""
    schedule: Literal["cosine", "wsd", "linear", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.03
    """Part of the steps in which the learning rate rises."""
    floor: Annotated[float, Ge(0), Le(1)] = 0.0
    """The last learning rate over the peak."""
    epochs: Annotated[int, Ge(1)] = 4
    """Passes over the training texts, at most, unless `min_steps` asks for more."""
    min_steps: Annotated[int, Ge(0)] = added(720, birth=0)
    """Optimizer steps that training is planned for at least: few texts are passed over more often than `epochs`."""
    patience: Annotated[int, Ge(1)] = 2
    """Stop after this many epochs without a better one on the validation texts; the best epoch is kept."""
    metric_for_best_model: Literal["macro_f1", "accuracy", "log_loss"] = added("log_loss", birth="macro_f1")
    """What makes an epoch the best. With few validation texts of some class macro_f1 is mostly chance; log_loss, of
    the probabilities as they are calibrated, is the steadiest."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Texts, or windows of long texts, in one optimizer step, all workers together."""
    method: Literal["full", "lora", "head"] = "full"
    """Train every weight; low-rank adapters of the blocks and the head; or the head alone over a frozen body."""
    lora_rank: Annotated[int, Ge(1)] = added(8, where=LORA)
    """Inner width of each adapter of method lora."""
    lora_alpha: Annotated[float, Gt(0)] = added(16.0, where=LORA)
    """What an adapter adds is scaled by this over its rank."""
    pooling: Literal["last", "first", "mean", "attention"] = "mean"
    """How a text becomes one vector: a token's, the mean, or a learned weighing. A stock Llama export needs last."""
    bidirectional: bool = added(False)
    """Let each token see the whole text, also in a body pretrained from left to right. It has no stock Llama export."""
    seq_len: Annotated[int, Ge(2)] | None = added(None)
    """Tokens of a text that are read at once, also more than a row of pretraining has; null is `model.seq_len`."""
    windows: Annotated[int, Ge(1)] = added(1)
    """Windows of `seq_len` tokens that are read of a long text, at most: its logits are their mean. 1 cuts the text."""
    window_overlap: Annotated[int, Ge(0)] = added(0)
    """Tokens of a text that two neighbouring windows share."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Dropout while fine-tuning."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the target that is spread evenly over all labels; with multi_label, over a label and its absence."""
    class_weights: Literal["auto", "none", "balanced"] = added("auto", birth="none")
    """balanced: each class counts alike, however many texts it has; with multi_label, as much as its absence, which
    makes rare classes likelier than they are. auto: balanced where a text has one class."""
    r_drop: Annotated[float, Ge(0)] = added(0.0)
    """Weight of the difference between two passes with different dropout (R-Drop), which takes twice the time."""
    layer_lr_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    """Learning rate of a layer over that of the one above it."""
    unfreeze: Annotated[float, Ge(0), Lt(1)] = added(0.0)
    """Part of training after which all layers learn: each begins later than the one above it (gradual unfreezing)."""

    average: Annotated[float, Ge(0), Lt(1)] = added(0.25, birth=0.0)
    """Share of the steps so far, about, over which the weights are averaged: the running mean, not the last weights, is
    what is validated and kept (arXiv:1212.1824). 0 takes the last."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seq_len is not None and (reason := self.reading.refusal(self.seq_len)) is not None:
            raise ValueError(reason)

    @property
    def optimizer_config(self) -> OptimizerConfig:
        return replace(
            super().optimizer_config,
            head_lr=self.head_lr,
            layer_lr_decay=self.layer_lr_decay,
            unfreeze=self.unfreeze,
            average=self.average,
        )

    def passes(self, steps_per_epoch: int) -> int:
        """Passes over the training texts that training is planned for."""
        return max(self.epochs, -(-self.min_steps // steps_per_epoch))

    @property
    def reading(self) -> Windows:
        """How a long text is read."""
        return Windows(self.windows, self.window_overlap) if self.windows > 1 else ONE_WINDOW


@dataclass(frozen=True, kw_only=True)
class Finetune(Stage[ClassifierFiles]):
    """Makes a classifier out of a base model and labels; without a base, out of random weights, for comparison."""

    VERSION = 2

    config: FinetuneConfig
    model: ModelConfig
    base: Stage[LanguageModelFiles] | None
    tokenizer: Stage[TokenizerFile]
    labels: Stage[Labels]
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse windows that the rows of the model are too short for before anything is trained, not after."""
        if (reason := self.config.reading.refusal(self.shape.seq_len)) is not None:
            raise UsageError(f"finetune.{reason}")

    @property
    def resources(self) -> Resources:
        return Resources(cpus=0, ranks=True)

    def load(self, path: Path) -> ClassifierFiles:
        return ClassifierFiles(path)

    def run(self, ctx: Context) -> None:
        ctx.on_ranks(self.train)
        best = checkpoint.newest(ctx.store.shelf(ctx.kind, ctx.key, BEST))
        assert best is not None, "every epoch is examined, and the first one is the best so far"
        labels, tokenizer = ctx.open(self.labels), ctx.open(self.tokenizer).file
        params = best.state.params
        if self.config.method == "lora":
            params = lora.merged(self._classifier(ctx, labels), params)
        write_classifier(
            ctx.out,
            params,
            self.shape,
            labels.names,
            self.config.pooling,
            tokenizer,
            self.config.reading,
            multi_label=labels.multi_label,
        )
        score = best.extra["history"][-1]
        ctx.notes["metrics"] = _measured(score)
        found = f"validation macro-F1 {score['macro_f1']:.3f}" if labels.split("validation").texts else "not validated"
        ctx.notes["headline"] = f"{found} (epoch {score['epoch'] + 1})"
        ctx.notes["datasets"] = [ctx.dataset(self.labels, split) for split in ("train", "validation")]
        ctx.notes["model"] = {"role": "classifier-weights"}

    def train(self, ctx: RankContext) -> None:
        """What each rank does. The weights of the best epoch are left as the checkpoint in BEST."""
        prepare_process(ctx.cpus)
        labels, tokenizer = ctx.open(self.labels), ctx.open(self.tokenizer)
        sampling, exam = self._data(labels, tokenizer.load())
        classifier = self._classifier(ctx, labels)
        with TrainingRun(
            ctx,
            self.config,
            self.config.create_engine(classifier, self._objective(sampling), self.model.n_layers),
            total_steps=self.config.passes(sampling.steps_per_epoch) * sampling.steps_per_epoch,
            tokens_per_step=float(np.mean([len(d) for d in sampling.documents])) * self.config.batch_size,
            extra={"history": []},
        ) as training:
            self._fit(ctx, training, sampling, exam)

    def _data(self, labels: Labels, tokenizer: Tokenizer) -> tuple[LabelledSampling, "Exam"]:
        """What is learned, each window of a text by itself with the class of the text, and what it is examined on."""
        seq_len, windows = self.shape.seq_len, self.config.reading
        train_split, exam_split = labels.split("train"), labels.split("validation")
        texts = tokenize_windows(tokenizer, train_split.texts, seq_len, windows)
        counts = [len(text) for text in texts]
        sampling = LabelledSampling(
            documents=[window for text in texts for window in text],
            targets=np.repeat(train_split.targets, counts, axis=0),
            weights=loss_weights(counts),
            seq_len=seq_len,
            documents_per_step=self.config.batch_size,
            micro_batch_size=self.config.micro_batch_size,
            seed=self.seed,
            dropout=self.config.dropout > 0,
        )
        return sampling, Exam(tokenize_windows(tokenizer, exam_split.texts, seq_len, windows), exam_split.targets)

    @property
    def shape(self) -> ModelConfig:
        """The body as it is fine-tuned and used."""
        cfg = self.config
        return replace(
            self.model,
            dropout=cfg.dropout,
            causal=self.model.causal and not cfg.bidirectional,
            seq_len=cfg.seq_len or self.model.seq_len,
        )

    def _classifier(self, ctx: RankContext, labels: Labels) -> Classifier:
        """The base model, or random weights in its place, with a classification head."""
        cfg = self.config
        language_model = LanguageModel(replace(self.shape, activation_checkpointing=cfg.activation_checkpointing))
        if self.base is None:
            initialize(language_model, self.seed)
        else:
            language_model.load_state_dict(ctx.open(self.base).load().model.state_dict())
        classifier = swap_head(
            language_model, len(labels.names), cfg.pooling, self.seed, multi_label=labels.multi_label
        )
        if cfg.method == "lora":
            lora.add(classifier, cfg.lora_rank, cfg.lora_alpha, self.seed)
            classifier.head.requires_grad_()
        else:
            classifier.body.requires_grad_(cfg.method == "full")
        return classifier

    def _objective(self, sampling: LabelledSampling) -> Callable[..., Any]:
        cfg, targets = self.config, sampling.targets
        loss = multi_label.loss if is_multi_label(targets) else classification.loss
        balanced = weighs_classes(cfg.class_weights, multi_label=is_multi_label(targets))
        weights = balanced_weights(targets, sampling.weights) if balanced else None
        return partial(loss, label_smoothing=cfg.label_smoothing, class_weights=weights, r_drop=cfg.r_drop)

    def _fit(self, ctx: RankContext, training: TrainingRun, sampling: LabelledSampling, exam: "Exam") -> None:
        """Train epoch by epoch until validation stops getting better."""
        start, per_epoch = training.resume(), sampling.steps_per_epoch
        history: list[dict[str, Any]] = training.checkpoints.extra["history"]
        for epoch in range(len(history), self.config.passes(per_epoch)):
            if epoch and epoch - 1 - best_epoch(history, self.config.metric_for_best_model) >= self.config.patience:
                break
            end = (epoch + 1) * per_epoch
            for _ in training.steps(sampling, start=start, stop=end):
                pass
            start = end
            with training.meter.pause():
                history.append({"epoch": epoch, **exam.score(training.engine, self.config.precision)})
                self._keep(ctx, training, history, end)

    def _keep(self, ctx: RankContext, training: TrainingRun, history: list[dict[str, Any]], step: int) -> None:
        """Record an epoch's score, and keep its weights if it is the best, before the checkpoint that says so."""
        score = history[-1]
        ctx.tracker.metrics(_measured(score), step=step - 1)
        if best_epoch(history, self.config.metric_for_best_model) == score["epoch"]:
            training.checkpoints.save_weights(step, ctx.store.shelf(ctx.kind, ctx.key, BEST))
        training.checkpoints.save(step)


@dataclass(frozen=True, eq=False)
class Exam:
    """The validation texts, as the token ids of their windows, with their labels."""

    documents: list[list[np.ndarray]]
    targets: Targets

    def score(self, engine: Engine, precision: str) -> dict[str, float]:
        chosen = resolve(precision, engine.device)
        share = partial(
            document_probabilities,
            documents=self.documents,
            precision=chosen,
            rank=engine.rank,
            world_size=engine.world_size,
        )
        table = engine.sum(torch.from_numpy(engine.forward(share)).to(engine.device)).cpu().numpy()
        return metrics.validated(self.targets, table)


def weighs_classes(class_weights: str, *, multi_label: bool) -> bool:
    """Whether classes are to count alike; with `auto` not where a text may have several."""
    return class_weights == "balanced" or (class_weights == "auto" and not multi_label)


def balanced_weights(targets: Targets, weights: np.ndarray | None = None) -> torch.Tensor:
    """float32 [n_labels], inverse to the rows of each class, which count `weights`, so that the mean over all is 1.

    Where a row may have several classes, the rows without each over those with it, so that either weigh the same.
    """
    if is_multi_label(targets):
        rows = np.ones(len(targets)) if weights is None else weights
        there = rows @ targets
        return torch.tensor(np.maximum(rows.sum() - there, 1) / there, dtype=torch.float32)
    counts = np.bincount(targets, weights)
    return torch.tensor(len(targets) / (len(counts) * counts), dtype=torch.float32)


def _measured(score: Mapping[str, float]) -> dict[str, float]:
    return {f"val/{name}": value for name, value in score.items() if name != "epoch" and not math.isnan(value)}


def best_epoch(history: Sequence[Mapping[str, Any]], metric: str) -> int:
    """The first epoch with the best score; without validation texts, which give NaN, the last one."""
    if math.isnan(history[-1][metric]):
        return history[-1]["epoch"]
    sign = -1 if metric == "log_loss" else 1
    return max(history, key=lambda score: (sign * score[metric], -score["epoch"]))["epoch"]
