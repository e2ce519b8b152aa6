"""Kill a small pipeline at seeded moments, go on, and compare all it leaves with an undisturbed run.

`python -m benchmarks.kill --trials 200 --seed 0 --ray 20`: so many trials, of which so many under Ray, where the run
starts its lost processes again by itself; the others are plain processes, killed and started again up to three times.
Places to die at are in every stage, in the writing of checkpoints, and in going on from them (`fault_point`). A trial
that fails prints its kills, so that it can be repeated; the exit code is 1.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from pipeline import faults, ledger
from pipeline.assemble import Graph, assemble
from pipeline.config import load
from pipeline.pipeline_config import PipelineConfig
from pipeline.publish import read_manifest
from pipeline.runner import Built, build, submit_here
from pipeline.store import Store
from pipeline.tracking import read_journal

CONFIG = Path("configs/smoke.yaml")
SETTINGS = [
    "pretrain.steps=20",
    "pretrain.ledger=true",
    "pretrain.log_every=1",
    "finetune.ledger=true",
    "finetune.epochs=1",
    "finetune.log_every=1",
    "evaluate.random_init=false",
    "cluster.cpus=1",
]
TIMINGS = ("second", "latency", "mfu")
Kill = tuple[str, int]
"""A fault point, and on which pass."""


@dataclass(frozen=True)
class Trace:
    """All of a run that has to be the same however often it was killed."""

    digests: dict[str, str]
    points: dict[str, list[tuple[int, str, float]]]
    """Of each stage's journal, sorted, so that a doubled point shows."""
    samples: dict[str, dict[int, "Counter[int]"]]
    """What each step of a training read."""


def graph() -> Graph:
    return assemble(load(PipelineConfig, CONFIG, SETTINGS).config)


def pipeline(home: Path, kill: Kill) -> int:
    """Run the pipeline in a process of its own, forked so that nothing is imported again; its exit code."""
    child = os.fork()
    if child == 0:
        os.environ["GRISTMILL_FAULT"] = f"{kill[0]}:{kill[1]}"
        torch.set_num_threads(1)
        sys.stderr = (home / "log.txt").open("a")
        keys = {e.stage.name: e.key for e in build(graph().targets, Store(home), submit_here) if isinstance(e, Built)}
        (home / "keys.json").write_text(json.dumps(keys))
        (home / "passes.json").write_text(json.dumps(faults.passes))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def trace(home: Path, keys: Mapping[str, str]) -> Trace:
    store = Store(home)
    digests, points, samples = {}, {}, {}
    for stage in graph().targets:
        key = keys[stage.name]
        manifest = read_manifest(store.path(stage.kind, key))
        digests[stage.name] = manifest.digest if manifest else "nothing"
        journal = store.journal(stage.kind, key)
        points[stage.name] = sorted(
            (point.step, name, value)
            for point in read_journal(journal)
            for name, value in point.metrics.items()
            if not any(word in name for word in TIMINGS)
        )
        samples[stage.name] = ledger.read(journal.with_suffix(".ledger"))
    return Trace(digests, points, samples)


@dataclass(frozen=True)
class Outcome:
    kills: Sequence[Kill]
    differences: int
    lost: int
    doubled: int

    @property
    def good(self) -> bool:
        return not (self.differences or self.lost or self.doubled)


def compare(wanted: Trace, got: Trace, kills: Sequence[Kill]) -> Outcome:
    """How two runs differ: artifacts, and the steps that were lost or done twice as ledger and journal have it."""
    differences = sum(got.digests[stage] != digest for stage, digest in wanted.digests.items())
    lost = doubled = 0
    for stage in wanted.digests:
        for old, new in (
            (Counter(wanted.points[stage]), Counter(got.points[stage])),
            (_read(wanted.samples[stage]), _read(got.samples[stage])),
        ):
            lost += (old - new).total()
            doubled += (new - old).total()
    return Outcome(kills, differences, lost, doubled)


def _read(samples: Mapping[int, "Counter[int]"]) -> "Counter[tuple[int, int]]":
    return Counter({(step, sample): n for step, read in samples.items() for sample, n in read.items()})


def draw(chance: random.Random, passes: Mapping[str, int], most: int) -> list[Kill]:
    """One to `most` kills: of each a place, every one as likely, and a pass of those that a whole run makes there."""
    points = chance.choices(sorted(passes), k=chance.randint(1, most))
    return [(point, chance.randint(1, passes[point])) for point in points]


def plain_trial(home: Path, kills: Sequence[Kill], wanted: Trace) -> Outcome:
    happened = [kill for kill in kills if pipeline(home, kill) == -9]
    code = pipeline(home, ("none", 0))
    assert code == 0, f"{kills}: a run that nobody killed ended with {code}; see {home}/log.txt"
    return compare(wanted, trace(home, json.loads((home / "keys.json").read_text())), happened)


def ray_trial(home: Path, kill: Kill, wanted: Trace) -> Outcome:
    marker = home / "killed"
    command = [sys.executable, "-m", "jobs.cli", "run", str(CONFIG), "--json"]
    done = subprocess.run(
        [*command, *(part for setting in SETTINGS for part in ("--set", setting))],
        env=os.environ | {"GRISTMILL_HOME": str(home), "GRISTMILL_FAULT": f"{kill[0]}:{kill[1]}:{marker}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{kill}: {done.stderr[-2000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    keys = {stage["name"]: stage["key"] for stage in result["stages"]}
    return compare(wanted, trace(home, keys), [kill] if marker.exists() else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", type=int, default=20, help="trials under Ray, out of all")
    options = parser.parse_args()
    start, scratch = time.monotonic(), Path(tempfile.mkdtemp(prefix="kill-"))
    (scratch / "whole").mkdir()
    assert pipeline(scratch / "whole", ("none", 0)) == 0
    wanted = trace(scratch / "whole", json.loads((scratch / "whole" / "keys.json").read_text()))
    passes = json.loads((scratch / "whole" / "passes.json").read_text())

    outcomes: dict[str, list[Outcome]] = {"plain": [], "Ray": []}
    for number in range(options.trials):
        chance = random.Random(f"{options.seed}-{number}")
        home = scratch / str(number)
        home.mkdir()
        if number < options.ray:
            outcome = ray_trial(home, draw(chance, passes, most=1)[0], wanted)
        else:
            outcome = plain_trial(home, draw(chance, passes, most=3), wanted)
        outcomes["Ray" if number < options.ray else "plain"].append(outcome)
        if not outcome.good:
            print(f"trial {number} of seed {options.seed}: {outcome}", flush=True)
        shutil.rmtree(home)
    shutil.rmtree(scratch)
    report(options.seed, outcomes, time.monotonic() - start)
    sys.exit(not all(outcome.good for own in outcomes.values() for outcome in own))


def report(seed: int, outcomes: Mapping[str, Sequence[Outcome]], seconds: float) -> None:
    print(f"{machine()}, seed {seed}, {seconds:.0f} s\n")
    print("| under | trials | kills | artifacts that differ | steps lost | steps doubled |\n|---|---|---|---|---|---|")
    for name, own in outcomes.items():
        counts = (
            sum(len(o.kills) for o in own),
            *(sum(getattr(o, f) for o in own) for f in ("differences", "lost", "doubled")),
        )
        print(f"| {name} | {len(own)} | {' | '.join(map(str, counts))} |")
    where = Counter(point for own in outcomes.values() for o in own for point, _ in o.kills)
    print("\nKilled at: " + ", ".join(f"{point} {n}" for point, n in sorted(where.items())))


if __name__ == "__main__":
    main()
