"""What the pipeline adds to the work itself: `python -m benchmarks.overhead`, two minutes.

First the training loop at 10M: data order, batches, guard and meter around an engine that does nothing, without and
with the journal, beside a step of the engine itself. Then the quickstart with little training, and the same run again,
which reuses everything: what imports, Ray and MLflow take.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import shapes
from benchmarks.timing import machine
from model.batch import Batch
from model.heads import LanguageModel
from model.init import initialize
from model.objectives import pretraining
from pipeline.batches import LanguageSampling
from pipeline.guard import Guard
from pipeline.health import Health
from pipeline.meter import Meter
from pipeline.schedule import ScheduleConfig, lr_scale
from pipeline.tracking import Recorder, Silent, Tracker
from pipeline.train import train
from pipeline.training import TrainingConfig, prepare_process

SHAPE = "10M"
LOOP_STEPS, ENGINE_STEPS, ROUNDS = 500, 12, 5
GOALS = {"loop": 0.03, "journal": 0.005, "start": 15.0, "reused": 10.0}
QUICKSTART = (
    "run",
    "configs/quickstart.yaml",
    "--json",
    "--set",
    "pretrain.tokens=100000",
    "--set",
    "finetune.epochs=1",
)


class Idle:
    """An engine without a model: each call returns at once, so that what is left is the loop."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def accumulate(self, batch: Batch, targets: int) -> Tensor:
        del batch, targets
        return torch.ones(())

    def sum(self, value: Tensor) -> Tensor:
        return value

    def step(self, scale: float, judge: Any, progress: float) -> Tensor:
        del scale, progress
        norm = torch.ones(())
        judge(norm)
        return norm


def loop_seconds(engine: Any, tracker: Tracker, steps: int, folder: Path) -> float:
    """Mean seconds of a step of everything that watches a training."""
    sampling = LanguageSampling(
        stream=shapes.stream(SHAPE, folder),
        seq_len=shapes.SEQ_LEN,
        rows_per_step=shapes.ROWS,
        micro_batch_size=shapes.ROWS,
        seed=0,
        examples=partial(pretraining("next_token").examples, masking=None),
    )
    course = partial(lr_scale, steps=steps, config=ScheduleConfig())
    reports = train(engine, sampling, course, Guard(engine.device), start=0, stop=steps)
    watched = Meter(tracker, 1e-3, 10, steps, shapes.ROWS * shapes.SEQ_LEN).watch(Health(0).watch(reports))
    began = time.perf_counter()
    for _ in watched:
        pass
    return (time.perf_counter() - began) / steps


def engine_seconds() -> float:
    """Median seconds of a step of the engine on the same rows, with nothing around it."""
    cfg, objective = shapes.ours(SHAPE), pretraining("next_token")
    model = LanguageModel(cfg)
    initialize(model, 0)
    engine = TrainingConfig().create_engine(model, objective.loss, cfg.n_layers)
    rows = shapes.tokens(SHAPE, shapes.ROWS)
    batch = Batch(rows[:, :-1], rows[:, 1:], torch.zeros(shapes.ROWS, shapes.SEQ_LEN, dtype=torch.int32))
    seconds = []
    for _ in range(ENGINE_STEPS):
        began = time.perf_counter()
        engine.accumulate(batch, rows[:, 1:].numel())
        engine.step(1.0)
        seconds.append(time.perf_counter() - began)
    engine.close()
    return statistics.median(seconds[2:])


def loop() -> dict[str, float]:
    """Seconds a step: of the engine, of the loop around it, and of the journal."""
    prepare_process(torch.get_num_threads())
    found: dict[str, list[float]] = {"loop": [], "journal": []}
    with tempfile.TemporaryDirectory() as place:
        for number in range(ROUNDS):
            silent = loop_seconds(Idle(), Silent(), LOOP_STEPS, Path(place))
            recorder = Recorder(Path(place, f"{number}.jsonl"))
            found["loop"].append(silent)
            found["journal"].append(loop_seconds(Idle(), recorder, LOOP_STEPS, Path(place)) - silent)
            recorder.close()
    return {"engine": engine_seconds(), **{name: statistics.median(values) for name, values in found.items()}}


def run(home: Path) -> dict[str, float]:
    """Where the time of a run went, by what it says itself; `wall` is by the clock of who waits for it."""
    command = [str(Path(sys.executable).with_name("gristmill")), *QUICKSTART]
    began = time.monotonic()
    env = {**os.environ, "GRISTMILL_HOME": str(home)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return {**json.loads(done.stdout.splitlines()[-1])["seconds"], "wall": time.monotonic() - began}


def told(name: str, what: str, value: float, unit: str) -> str:
    goal = GOALS[name]
    shown = (f"{value:.2%}", f"{goal:.1%}") if unit == "%" else (f"{value:.1f} s", f"{goal:.0f} s")
    return f"| {what} | {shown[0]} | {shown[1]} |{' missed' if value > goal else ''}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(machine())
    step = loop()
    print(f"\nA step of the engine at {SHAPE}: {step['engine'] * 1e3:.0f} ms.\n\n| | is | goal |\n|---|---|---|")
    print(told("loop", "the loop around it", step["loop"] / step["engine"], "%"))
    print(told("journal", "the journal", step["journal"] / step["engine"], "%"), flush=True)
    with tempfile.TemporaryDirectory() as home:
        first, again = run(Path(home)), run(Path(home))
    print(told("start", "imports, Ray and MLflow of a run", first["start"] + first["between"] + first["tracking"], "s"))
    print(told("reused", "the same run again, all reused", again["wall"], "s"))


if __name__ == "__main__":
    main()
