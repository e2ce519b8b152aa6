"""Pretraining steps of 4,096 tokens beside transformers, its Trainer, accelerate and litgpt.

`python -m benchmarks.pretrain [--shape 10M]`. All train the same Llama with AdamW, clipped gradients and bf16
autocast. The first table is each as it comes; in the second all have the same allocator settings and compile.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import shapes
from benchmarks.harness import KEPT_MEMORY, Contender, Measured, Race, Turn, command_line
from model.flops import training_flops_per_token
from model.heads import LanguageModel
from model.init import initialize
from model.objectives import pretraining
from pipeline.batches import LanguageSampling
from pipeline.guard import Guard
from pipeline.meter import Meter
from pipeline.precision import measured_matmul_flops
from pipeline.schedule import ScheduleConfig, lr_scale
from pipeline.tracking import Silent
from pipeline.train import train
from pipeline.training import TrainingConfig, prepare_process

PEERS = {"PYTHONPATH": ".peers"}
"""Where `make bench` puts rivals whose pins do not go with ours."""
STEPS = {"10M": 4, "50M": 2}
"""Of a slice."""
GOALS = {"10M": {"Trainer bf16": 1.9, "litgpt bf16": 1.5}, "50M": {"Trainer bf16": 1.7, "litgpt bf16": 1.4}}
EQUAL = ("transformers loop bf16, compiled", "Trainer bf16, compiled", "litgpt bf16, compiled")
MFU_GOALS = {"10M": 0.45, "50M": 0.60}
LR = 1e-3


def ours(turn: Turn, shape: str) -> None:
    """The loop that `gristmill run` trains with: data order, guard, meter and all."""
    prepare_process(torch.get_num_threads())
    cfg, config = shapes.ours(shape), TrainingConfig(lr=LR)
    model, objective = LanguageModel(cfg), pretraining("next_token")
    initialize(model, 0)
    engine = config.create_engine(model, objective.loss, cfg.n_layers)
    with tempfile.TemporaryDirectory() as folder:
        sampling = LanguageSampling(
            stream=shapes.stream(shape, Path(folder)),
            seq_len=shapes.SEQ_LEN,
            rows_per_step=shapes.ROWS,
            micro_batch_size=shapes.ROWS,
            seed=0,
            examples=partial(objective.examples, masking=None),
        )
        total, tokens = 10**6, shapes.ROWS * shapes.SEQ_LEN
        course = partial(lr_scale, steps=total, config=ScheduleConfig())
        steps = train(engine, sampling, course, Guard(engine.device), start=0, stop=total)
        for report in Meter(Silent(), LR, 10, total, tokens).watch(steps):
            if report.step % STEPS[shape] == 1:
                turn(STEPS[shape] * tokens)


def batches(shape: str) -> Iterator[torch.Tensor]:
    rows = shapes.tokens(shape)[:, :-1]
    while True:
        yield from rows.split(shapes.ROWS)


def transformers_loop(turn: Turn, shape: str, bf16: bool = True, compiled: bool = False) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(shapes.llama(shape))
    step = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    for number, ids in enumerate(batches(shape)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = step(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number % STEPS[shape] == 0:
            turn(STEPS[shape] * ids.numel())


def accelerate_loop(turn: Turn, shape: str) -> None:
    from accelerate import Accelerator
    from transformers import LlamaForCausalLM

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = LlamaForCausalLM(shapes.llama(shape))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LR, fused=True))
    for number, ids in enumerate(batches(shape)):
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number % STEPS[shape] == 0:
            turn(STEPS[shape] * ids.numel())


def trainer(turn: Turn, shape: str, compiled: bool = False) -> None:
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class TakeTurns(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            del args, control, more
            if state.global_step % STEPS[shape] == 1:
                turn(STEPS[shape] * shapes.ROWS * shapes.SEQ_LEN)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=shapes.ROWS,
            max_steps=10**6,
            learning_rate=LR,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=True,
            torch_compile=compiled,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in shapes.tokens(shape)[:, :-1]]
        Trainer(
            LlamaForCausalLM(shapes.llama(shape)),
            arguments,
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            callbacks=[TakeTurns()],
        ).train()


def litgpt_loop(turn: Turn, shape: str, compiled: bool = False) -> None:
    """As litgpt's own pretraining does a step on one device, without Fabric around it."""
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]
    from litgpt.utils import chunked_cross_entropy  # pyright: ignore[reportMissingImports]

    model = GPT(shapes.litgpt(shape))
    model.lm_head.weight = model.transformer.wte.weight
    step = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    for number, ids in enumerate(batches(shape)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = step(ids)
            loss = chunked_cross_entropy(logits[:, :-1], ids[:, 1:], chunk_size=0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number % STEPS[shape] == 0:
            turn(STEPS[shape] * ids.numel())


def contenders(shape: str) -> list[Contender]:
    """Everybody as they come; ours is first."""

    def one(name: str, function: str, **settings: Any) -> Contender:
        return Contender(name, f"benchmarks.pretrain:{function}", {"shape": shape, **settings})

    return [
        one("gristmill", "ours"),
        one("transformers loop fp32", "transformers_loop", bf16=False),
        one("transformers loop bf16", "transformers_loop"),
        one("accelerate bf16", "accelerate_loop"),
        one("Trainer bf16", "trainer"),
        Contender("litgpt bf16", "benchmarks.pretrain:litgpt_loop", {"shape": shape}, PEERS, ["litgpt.model"]),
    ]


def on_equal_terms(shape: str) -> list[Contender]:
    """Rivals with what we have by ourselves: memory that stays, and their own compile."""

    def one(name: str, function: str, env: dict[str, str], **settings: Any) -> Contender:
        return Contender(name, f"benchmarks.pretrain:{function}", {"shape": shape, **settings}, {**KEPT_MEMORY, **env})

    return [
        one("gristmill", "ours", {}),
        one("transformers loop bf16, compiled", "transformers_loop", {}, compiled=True),
        one("Trainer bf16, compiled", "trainer", {}, compiled=True),
        one("litgpt bf16, compiled", "litgpt_loop", PEERS, compiled=True),
    ]


def mfu(shape: str, measured: Measured) -> str:
    """Of the most that a bf16 matrix product reaches on this machine."""
    flops = training_flops_per_token(shapes.ours(shape), shapes.SEQ_LEN)
    share = measured.rate * flops / measured_matmul_flops("bf16", torch.device("cpu"), seconds=2.0)
    return f"Our MFU is {100 * share:.0f} %, the goal {100 * MFU_GOALS[shape]:.0f} %."


def races(shape: str) -> Iterator[Race]:
    yield Race(f"{shape}, as they come", contenders(shape), "tokens", GOALS[shape], partial(mfu, shape))
    goals = dict.fromkeys(EQUAL, 1.0)
    yield Race(f"{shape}, on equal terms", on_equal_terms(shape), "tokens", goals, takes_long=True)  # they compile


if __name__ == "__main__":
    command_line(__doc__, races)
