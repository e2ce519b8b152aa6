"""Kill each kind of process of a run on two workers under Ray, and see that the run ends with the right result.

`python -m benchmarks.lose --times 10 --seed 0`: so many runs a kind. The moment is drawn from the seed, between the
first checkpoint of pretraining and its end. Right means: every artifact has the digest of an undisturbed run, and the
ledger, the journal and MLflow have every step once. Recovery is the time from the kill to the first step that training
processes started after it have journalled; a run goes on by itself, and a dead driver is started again by its
supervisor (`jobs/supervise.py`), as on a cluster. A dead tracking server is started again within seconds, and
`gristmill sync` is given once at the end.
"""

import argparse
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.timing import machine
from jobs.mlflow_client import connect, default_uri
from jobs.mlflow_runs import RUN, STAGE
from jobs.record import list_records
from jobs.ui import command as server_command
from jobs.ui import environment as server_environment
from pipeline import ledger
from pipeline.publish import read_manifest
from pipeline.tracking import read_journal

KINDS = ("worker", "driver", "controller", "raylet", "tracking server")
SETTINGS = [
    "labels=null",
    "cluster.workers=2",
    "pretrain.zero_stage=1",
    "pretrain.checkpoint_seconds=0.5",
    "pretrain.log_every=1",
    "pretrain.ledger=true",
]


@dataclass(frozen=True)
class Trial:
    right: bool
    recovery_seconds: float | None
    """None where there is nothing to wait for, or the run was over before."""


def start(home: Path, uri: str, steps: int) -> "subprocess.Popen[bytes]":
    home.mkdir()
    settings = (*SETTINGS, f"pretrain.steps={steps}")
    run = ["run", "configs/smoke.yaml", *(part for setting in settings for part in ("--set", setting))]
    with (home / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.supervise", "--home", str(home), "--", *run, "--set", f"tracking.uri={uri}"],
            stdout=log,
            stderr=log,
        )


def living(kind: str, supervisor: int) -> dict[int, psutil.Process]:
    """The processes of this kind below the supervisor, by pid."""
    words: dict[str, Callable[[list[str]], bool]] = {
        "worker": lambda line: line[0].startswith("ray::RayTrainWorker"),
        "controller": lambda line: line[0].startswith("ray::TrainController"),
        "raylet": lambda line: line[0].endswith("raylet/raylet"),
        "driver": lambda line: "run" in line and "configs/smoke.yaml" in line,
    }
    found = {}
    for process in psutil.Process(supervisor).children(recursive=True):
        with suppress(psutil.Error):
            if (line := process.cmdline()) and words[kind](line):
                found[process.pid] = process
    return found


def journal(home: Path) -> Path | None:
    return next(iter((home / "journal" / "pretrain").glob("*.jsonl")), None)


def length(home: Path) -> int:
    path = journal(home)
    return path.stat().st_size if path else 0


def wait_for(what: Callable[[], object], seconds: float = 300.0) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if what():
            return True
        time.sleep(0.1)
    return False


def kill(kind: str, home: Path, supervisor: "subprocess.Popen[bytes]") -> float | None:
    """Kill one process of this kind; the seconds until another set of workers has journalled a step, None if none did.

    What journals first may be an orphan of the killed process, so the new workers are waited for.
    """
    before = living("worker", supervisor.pid).keys()
    next(iter(living(kind, supervisor.pid).values())).kill()
    killed = time.monotonic()

    def ended() -> bool:
        return supervisor.poll() is not None

    wait_for(lambda: ended() or living("worker", supervisor.pid).keys() - before)
    journalled = length(home)
    wait_for(lambda: ended() or length(home) > journalled)
    return None if ended() else time.monotonic() - killed


def digests(home: Path) -> dict[str, str]:
    found = {path.parent.parent.name: read_manifest(path) for path in (home / "store").glob("*/*")}
    return {kind: manifest.digest for kind, manifest in found.items() if manifest}


def steps_once(home: Path, steps: int) -> bool:
    """Whether the journal has every step once, and the ledger every sample of it."""
    path = journal(home)
    assert path is not None
    told = [point.step for point in read_journal(path) if "train/loss" in point.metrics]
    read = ledger.read(path.with_suffix(".ledger"))
    return told == list(range(steps)) == sorted(read)


def points_once(uri: str, home: Path, steps: int) -> bool:
    """Whether MLflow has the loss of every step once, of the run that this home holds."""
    (record,) = list_records(home)
    client = connect(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    wanted = f"tags.`{RUN}` = '{record.run}' AND tags.`{STAGE}` = 'pretrain'"
    children = client.search_runs(experiments, wanted)
    history = [metric for run in children for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    return sorted(metric.step for metric in history) == list(range(steps))


class Server:
    """A tracking server that can be killed, with another one started in its place."""

    def __init__(self, home: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self.uri, self._home = f"http://127.0.0.1:{self._port}", home
        home.mkdir()
        self.start()

    def start(self) -> None:
        with (self._home / "server.txt").open("a") as log:
            line = server_command(self._home, default_uri(self._home), "127.0.0.1", self._port)
            self._process = subprocess.Popen(
                line, stdout=log, stderr=log, env=server_environment(default_uri(self._home))
            )
        assert wait_for(self._answers), (self._home / "server.txt").read_text()

    def kill(self) -> None:
        for process in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            process.kill()
        self._process.wait()

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
            return True
        return False


def trial(kind: str, home: Path, chance: random.Random, steps: int, wanted: dict[str, str]) -> Trial:
    tracker = Server(home.with_name(f"{home.name}-server")) if kind == "tracking server" else None
    uri = tracker.uri if tracker else default_uri(home)
    supervisor = start(home, uri, steps)
    assert wait_for(lambda: list((home / "work" / "pretrain").glob("*/step-*"))), (home / "log.txt").read_text()
    time.sleep(chance.uniform(0, 2))
    recovery = None if tracker else kill(kind, home, supervisor)
    if tracker:
        tracker.kill()
        time.sleep(chance.uniform(0, 5))
        tracker.start()
    code = supervisor.wait(600)
    if tracker:  # what a run says that ends before its tracker is back
        subprocess.run(
            [sys.executable, "-m", "jobs.cli", "sync"], env=os.environ | {"GRISTMILL_HOME": str(home)}, check=True
        )
    right = code == 0 and digests(home) == wanted and steps_once(home, steps) and points_once(uri, home, steps)
    if not right:
        print(f"{kind}: exit code {code}, {digests(home)} for {wanted}; {home}/log.txt", flush=True)
    if tracker:
        tracker.kill()
    return Trial(right, recovery)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600, help="of a run; workers outlive their raylet by seconds")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--kept", type=Path, help="file of finished trials, which are not run again")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="lose-"))
    assert start(scratch / "whole", default_uri(scratch / "whole"), options.steps).wait(600) == 0
    wanted = digests(scratch / "whole")
    kept = options.kept or scratch / "trials.jsonl"
    done = _read(kept)

    def name(kind: str, number: int) -> str:
        return f"{options.seed}-{kind}-{number}-of-{options.steps}"

    for number in range(options.times):
        for kind in options.kinds:
            if (own := name(kind, number)) in done:
                continue
            home = scratch / f"{kind.replace(' ', '-')}-{number}"
            done[own] = trial(kind, home, random.Random(own), options.steps, wanted)
            with kept.open("a") as out:
                out.write(json.dumps({"name": own, **asdict(done[own])}) + "\n")
            if done[own].right:
                shutil.rmtree(home)
    trials = {kind: [done[name(kind, number)] for number in range(options.times)] for kind in options.kinds}
    report(options.seed, trials)
    sys.exit(not all(t.right for own in trials.values() for t in own))


def _read(kept: Path) -> dict[str, Trial]:
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    return {line.pop("name"): Trial(**line) for line in lines}


def report(seed: int, trials: Mapping[str, Sequence[Trial]]) -> None:
    print(f"{machine()}, seed {seed}\n")
    print("| killed | runs | right at the end | median recovery, s | longest |\n|---|---|---|---|---|")
    for kind, own in trials.items():
        taken = [t.recovery_seconds for t in own if t.recovery_seconds is not None]
        shown = f"{statistics.median(taken):.1f} | {max(taken):.1f}" if taken else "- | -"
        print(f"| {kind} | {len(own)} | {sum(t.right for t in own)} | {shown} |")


if __name__ == "__main__":
    main()
