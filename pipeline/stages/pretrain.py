"""Pretraining: a body learns from the tokens of the shards alone, next ones or hidden ones."""

import math
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from tokenizers import Tokenizer

from model.config import ModelConfig
from model.decoding import chain
from model.flops import training_flops_per_token
from model.generate import generate
from model.heads import LanguageModel
from model.init import initialize
from model.objectives import Masking, Pretraining, pretraining
from pipeline import checkpoint
from pipeline.batches import Examples, LanguageSampling, language_batches
from pipeline.engine import Engine
from pipeline.errors import EnvironmentProblem
from pipeline.identity import added, knob
from pipeline.plots import training_curve
from pipeline.stage import Context, RankContext, Resources, Stage
from pipeline.stages.shards import TokenShards
from pipeline.stages.tokenizer import TokenizerFile
from pipeline.token_stream import TokenStream
from pipeline.tokens import special_ids
from pipeline.tracking import read_journal
from pipeline.train import StepReport
from pipeline.training import TrainingConfig, TrainingRun, prepare_process
from pipeline.weights import LanguageModelFiles, write_language_model

SAMPLE_RULES = {"temperature": 0.8, "top_k": 50}


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainingConfig):
    """How the base model is pretrained. Give `steps`, `tokens` or `epochs`."""

    objective: Literal["next_token", "masked", "masked_next_token"] = added("next_token")
    """What is learned: the next token; hidden tokens, by a body that reads both ways (BERT); or these, each asked for
    by the token before it (LLM2Vec)."""
    mask_rate: Annotated[float, Gt(0), Lt(1)] = added(0.15)
    """Of the tokens, how many a masked objective hides."""
    steps: Annotated[int, Ge(1)] | None = None
    """Optimizer steps."""
    tokens: Annotated[int, Ge(1)] | None = None
    """Tokens to train on, in place of `steps`; rounded up to whole steps."""
    epochs: Annotated[float, Gt(0)] | None = added(None)
    """Passes over the training split, in place of `steps`; rounded up to whole steps."""
    global_batch_tokens: Annotated[int, Ge(1)] = 32_768
    """Tokens in one optimizer step, all workers together; rounded down to whole rows."""
    validate_every: Annotated[int, Ge(1)] = knob(200)
    """Steps between two validations; the last step is always followed by one."""
    validation_tokens: Annotated[int, Ge(1)] = 262_144
    """Tokens of the validation split that a validation reads at most."""
    samples: Annotated[int, Ge(0)] = 4
    """Texts that the finished model writes from nothing, to be read by a person; none if it reads both ways."""
    compile: bool = added(False)
    """Fuse what the body does between its matrix products (torch.compile), which takes half a minute at the start of
    every process: for long runs on a GPU. On a CPU the kernels of model/native, which it does not use, are faster."""
    spike_sigma: Annotated[float, Ge(0)] = 6.0
    """A step whose loss or gradient norm lies this many deviations above those of late is not taken; 0 takes any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(length is not None for length in (self.steps, self.tokens, self.epochs)) != 1:
            raise ValueError(
                f"give exactly one of steps={self.steps}, tokens={self.tokens} and epochs={self.epochs}; "
                "one that a file lower down gives is taken back by null"
            )

    def total_steps(self, sampling: LanguageSampling) -> int:
        rows = (self.epochs or 0) * sampling.n_rows or (self.tokens or 0) / sampling.seq_len
        return self.steps or math.ceil(rows / sampling.rows_per_step)


@dataclass(frozen=True, kw_only=True)
class Pretrain(Stage[LanguageModelFiles]):
    """Makes a language model out of token shards, from random weights or from another language model."""

    config: PretrainConfig
    model: ModelConfig
    shards: Stage[TokenShards]
    tokenizer: Stage[TokenizerFile]
    seed: int = 0
    base: Stage[LanguageModelFiles] | None = added(None)
    """What to go on from; None begins with random weights."""

    @property
    def resources(self) -> Resources:
        return Resources(cpus=0, ranks=True)

    def load(self, path: Path) -> LanguageModelFiles:
        return LanguageModelFiles(path)

    def run(self, ctx: Context) -> None:
        ctx.on_ranks(self.train)
        trained = checkpoint.newest(ctx.store.shelf(ctx.kind, ctx.key))
        assert trained is not None, "training ends with a checkpoint"
        write_language_model(ctx.out, trained.state.params, self.model, ctx.open(self.tokenizer).file)
        self._describe(ctx, trained.extra["summary"])

    def train(self, ctx: RankContext) -> None:
        """What each rank does. The weights are left as the last checkpoint."""
        prepare_process(ctx.cpus)
        cfg, shards = self.config, ctx.open(self.shards)
        tokens = special_ids(ctx.open(self.tokenizer).load())
        examples = self._examples((tokens.bos, tokens.eos, tokens.pad))
        sampling = self._sampling(shards, examples)
        total = cfg.total_steps(sampling)
        model = LanguageModel(replace(self.model, activation_checkpointing=cfg.activation_checkpointing))
        initialize(model, self.seed)
        if self.base is not None:
            take_over(model, ctx.open(self.base).load().model)
        if cfg.compile:
            compile_body(model)
        with TrainingRun(
            ctx,
            cfg,
            cfg.create_engine(model, self._objective.loss, self.model.n_layers),
            total_steps=total,
            tokens_per_step=sampling.rows_per_step * self.model.seq_len,
            spike_sigma=cfg.spike_sigma,
        ) as training:
            for report in training.steps(sampling, start=training.resume(), stop=total):
                if self._validation_due(report, total):
                    with training.meter.pause():
                        scores = self._validate(training.engine, shards.split("validation"), examples)
                    ctx.tracker.metrics(scores, step=report.step)
            training.finish()

    def _sampling(self, shards: TokenShards, examples: Examples) -> LanguageSampling:
        return LanguageSampling(
            stream=shards.split("train"),
            seq_len=self.model.seq_len,
            rows_per_step=max(1, self.config.global_batch_tokens // self.model.seq_len),
            micro_batch_size=self.config.micro_batch_size,
            seed=self.seed,
            examples=examples,
            dropout=self.model.dropout > 0,
        )

    @property
    def _objective(self) -> Pretraining:
        return pretraining(self.config.objective)

    def _examples(self, special: tuple[int, ...]) -> Examples:
        masking = Masking(rate=self.config.mask_rate, mask_id=self.model.vocab_size - 1, special=special)
        return partial(self._objective.examples, masking=masking)

    def _validate(self, engine: Engine, stream: TokenStream, examples: Examples) -> dict[str, float]:
        """Mean cross-entropy of the validation split in nats per target; for next tokens also in bits per byte of text.

        Bits per byte compare models across tokenizers; the end-of-text token counts as a cost and has no bytes.
        """
        seq_len, size = self.model.seq_len, self.config.micro_batch_size
        rows = min((stream.n_tokens - 1) // seq_len, max(1, self.config.validation_tokens // seq_len))
        if rows < 1:
            return {}
        batches = language_batches(
            stream, seq_len, size, rows, examples, rank=engine.rank, world_size=engine.world_size
        )
        with _not_compiled() if self.config.compile else nullcontext():
            losses = [engine.forward(partial(self._objective.loss, batch=batch.to(engine.device))) for batch in batches]
        nats = float(engine.sum(torch.stack([loss.sum for loss in losses]).sum()))
        targets = int(engine.sum(torch.stack([loss.count for loss in losses]).sum()))
        mean = nats / max(targets, 1)
        if self.config.objective != "next_token":
            return {"val/loss": mean}
        targets_per_byte = (stream.n_tokens - stream.n_documents) / stream.n_bytes
        return {"val/loss": mean, "val/bpb": mean / math.log(2) * targets_per_byte}

    def _validation_due(self, report: StepReport, total: int) -> bool:
        return (report.step + 1) % self.config.validate_every == 0 or report.step + 1 == total

    def _describe(self, ctx: Context, summary: Mapping[str, Any]) -> None:
        """Samples and curve into the artifact; speed, which no two runs share, into the notes."""
        points = list(read_journal(ctx.store.journal(self.kind, ctx.key)))
        training_curve(points, ctx.out / "loss.png")
        if self.model.causal:
            loaded = LanguageModelFiles(ctx.out).load()
            texts = sample_texts(loaded.model, loaded.tokenizer, self.config.samples, self.seed)
            (ctx.out / "samples.txt").write_text(texts)
        last = {name: value for point in points for name, value in point.metrics.items()}
        speed = summary["tokens_per_second"]
        asked = 1.0 if self.config.objective == "next_token" else self.config.mask_rate
        mfu = speed * training_flops_per_token(self.model, self.model.seq_len, asked) / summary["matmul_flops"]
        ctx.notes["metrics"] = {
            **{name: last[name] for name in ("val/loss", "val/bpb") if name in last},
            "train/loss_final": last["train/loss"],
            "tokens_per_second": speed,
            "mfu": mfu,
            "workers": summary["workers"],
            "checkpoint_seconds": summary["checkpoint_seconds"],
            "checkpoint_share": summary["checkpoint_share"],
        }
        ctx.notes["datasets"] = [ctx.dataset(self.shards, split) for split in ("train", "validation")]
        ctx.notes["files"] = sorted(path.name for path in ctx.out.iterdir() if path.suffix in (".png", ".txt"))
        ctx.notes["model"] = {"role": "base"}
        quality = next(f"{n} loss {last[f'{n}/loss']:.3f}" for n in ("val", "train") if f"{n}/loss" in last)
        quality += f", {last['val/bpb']:.3f} bits/byte" if "val/bpb" in last else ""
        ctx.notes["headline"] = f"{quality}, {speed:,.0f} tokens/s, MFU {100 * mfu:.0f} %"


def compile_body(model: LanguageModel) -> None:
    """Have the body compiled when it first runs, in place: parameters keep their names.

    Raises EnvironmentProblem if there is nothing to compile it with.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise EnvironmentProblem(
            f"pretrain.compile needs a C++ compiler, and {compiler} is not here: install it, or set compile to false"
        )
    model.body.compile(dynamic=False)


def _not_compiled() -> AbstractContextManager[Any]:
    """Run as it stands what has been compiled: forward passes of another kind would take longer to compile."""
    return torch.compiler.set_stance("force_eager")  # which imports the compiler: seconds


@torch.no_grad()
def take_over(model: LanguageModel, base: LanguageModel) -> None:
    """Copy the weights of `base` into `model`, in place. A token that only one of them has, to hide others, is left."""
    own = dict(model.named_parameters())
    for name, weight in base.named_parameters():
        own[name][: len(weight)].copy_(weight[: len(own[name])])


def sample_texts(model: LanguageModel, tokenizer: Tokenizer, count: int, seed: int) -> str:
    """What the model writes from nothing, a text a line."""
    room, tokens = min(64, model.cfg.seq_len - 1), special_ids(tokenizer)
    answers = generate(
        model, [[tokens.bos]] * count, max_new_tokens=room, transforms=chain(SAMPLE_RULES), eos_id=tokens.eos, seed=seed
    )
    return "".join(tokenizer.decode(ids).strip().replace("\n", " ") + "\n" for ids in answers)
