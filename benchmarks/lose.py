"""Kill each kind of process of a run on two workers under Ray, and see that the run ends with the right result.

`python -m benchmarks.lose --times 10 --seed 0`: so many runs a kind. The moment is drawn from the seed, between the
first checkpoint of pretraining and its end. Right means: every artifact has the digest of an undisturbed run, and the
ledger and the journal have every step once. Recovery is the time from the kill to the next journalled step; a run
goes on by itself, and a dead driver is started again by its supervisor (`jobs/supervise.py`), as on a cluster.
"""

import argparse
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.timing import machine
from jobs.mlflow_client import default_uri
from jobs.ui import command as server_command
from jobs.ui import environment as server_environment
from pipeline import ledger
from pipeline.publish import read_manifest
from pipeline.tracking import read_journal

KINDS = ("worker", "driver", "controller", "raylet", "tracking server")
STEPS = 150
SETTINGS = [
    "labels=null",
    "cluster.workers=2",
    f"pretrain.steps={STEPS}",
    "pretrain.zero_stage=1",
    "pretrain.checkpoint_seconds=0.5",
    "pretrain.log_every=1",
    "pretrain.ledger=true",
]


@dataclass(frozen=True)
class Trial:
    right: bool
    recovery_seconds: float | None
    seconds: float


def start(home: Path, uri: str) -> "subprocess.Popen[bytes]":
    home.mkdir()
    run = ["run", "configs/smoke.yaml", *(part for setting in SETTINGS for part in ("--set", setting))]
    with (home / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.supervise", "--home", str(home), "--", *run, "--set", f"tracking.uri={uri}"],
            stdout=log,
            stderr=log,
        )


def victim(kind: str, supervisor: int) -> psutil.Process | None:
    """A process of this kind below the supervisor, if there is one now."""
    words: dict[str, Callable[[list[str]], bool]] = {
        "worker": lambda line: line[0].startswith("ray::RayTrainWorker"),
        "controller": lambda line: line[0].startswith("ray::TrainController"),
        "raylet": lambda line: line[0].endswith("raylet/raylet"),
        "driver": lambda line: "run" in line and "configs/smoke.yaml" in line,
    }
    for process in psutil.Process(supervisor).children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if line and words[kind](line):
            return process
    return None


def journal(home: Path) -> Path | None:
    return next(iter((home / "journal" / "pretrain").glob("*.jsonl")), None)


def length(home: Path) -> int:
    path = journal(home)
    return path.stat().st_size if path else 0


def wait_for(what: Callable[[], object], seconds: float = 120.0) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if what():
            return True
        time.sleep(0.02)
    return False


def digests(home: Path) -> dict[str, str]:
    found = {path.parent.parent.name: read_manifest(path) for path in (home / "store").glob("*/*")}
    return {kind: manifest.digest for kind, manifest in found.items() if manifest}


def steps_once(home: Path) -> bool:
    """Whether the journal has every step once, and the ledger every sample of it."""
    path = journal(home)
    assert path is not None
    told = [point.step for point in read_journal(path) if "train/loss" in point.metrics]
    read = ledger.read(path.with_suffix(".ledger"))
    return told == list(range(STEPS)) == sorted(read)


@contextmanager
def server(home: Path, port: int) -> Iterator[Callable[[], None]]:
    """A tracking server; calling what is given kills it and starts another one in its place."""
    home.mkdir(exist_ok=True)
    running: list[subprocess.Popen[bytes]] = []

    def again() -> None:
        for old in running:
            for process in [*psutil.Process(old.pid).children(recursive=True), old]:
                process.kill()
            old.wait()
        with (home / "server.txt").open("a") as log:
            line = server_command(home, default_uri(home), "127.0.0.1", port)
            running[:] = [subprocess.Popen(line, stdout=log, stderr=log, env=server_environment(default_uri(home)))]

    again()
    try:
        yield again
    finally:
        for process in [*psutil.Process(running[0].pid).children(recursive=True), running[0]]:
            process.kill()


def trial(
    kind: str, home: Path, chance: random.Random, wanted: dict[str, str], tracker: tuple[str, Callable[[], None]]
) -> Trial:
    began, (uri, kill_server) = time.monotonic(), tracker
    supervisor = start(home, uri if kind == "tracking server" else default_uri(home))
    assert wait_for(lambda: list((home / "work" / "pretrain").glob("*/step-*"))), (home / "log.txt").read_text()
    time.sleep(chance.uniform(0, 2))
    recovery = None
    if kind == "tracking server":
        kill_server()
    elif (process := victim(kind, supervisor.pid)) is not None:
        process.kill()
        killed = time.monotonic()
        time.sleep(0.5)
        before = length(home)
        if wait_for(lambda: length(home) > before or supervisor.poll() is not None) and supervisor.poll() is None:
            recovery = time.monotonic() - killed
    code = supervisor.wait(600)
    right = code == 0 and digests(home) == wanted and steps_once(home)
    if not right:
        print(f"{kind}: exit code {code}, {digests(home)} for {wanted}; {home}/log.txt", flush=True)
    return Trial(right, recovery, time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="lose-"))
    assert start(scratch / "whole", default_uri(scratch / "whole")).wait(600) == 0
    wanted = digests(scratch / "whole")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    trials: dict[str, list[Trial]] = {kind: [] for kind in options.kinds}
    with server(scratch / "server", port) as kill_server:
        for number in range(options.times):
            for kind in options.kinds:
                chance = random.Random(f"{options.seed}-{kind}-{number}")
                home = scratch / f"{kind.replace(' ', '-')}-{number}"
                trials[kind].append(trial(kind, home, chance, wanted, (f"http://127.0.0.1:{port}", kill_server)))
                if trials[kind][-1].right:
                    shutil.rmtree(home)
    print(f"{machine()}, seed {options.seed}\n")
    print("| killed | runs | right at the end | median recovery, s | longest |\n|---|---|---|---|---|")
    for kind, own in trials.items():
        taken = [t.recovery_seconds for t in own if t.recovery_seconds is not None]
        shown = f"{statistics.median(taken):.1f} | {max(taken):.1f}" if taken else "nothing stops | -"
        print(f"| {kind} | {len(own)} | {sum(t.right for t in own)} | {shown} |")
    sys.exit(not all(t.right for own in trials.values() for t in own))


if __name__ == "__main__":
    main()
