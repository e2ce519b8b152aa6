"""Contenders beside each other: each in a process of its own, in slices that take turns; medians and paired ratios.

A contender is a function of a module that gets `turn` and its settings, prepares itself, does a little of its work so
that nothing is done for the first time in a turn, then works for ever and calls `turn(units)` after each slice: so a
loop that belongs to somebody else is measured from inside, by a callback. All prepare at once; then, while one works,
the others wait. Slices go A B C, C B A, ...: what drifts with time falls on all alike.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.timing import machine

KEPT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Tells glibc's malloc what pipeline/memory.py tells it, for programs that do not do so themselves."""

Turn = Callable[[float], None]


@dataclass(frozen=True)
class Contender:
    """`function` is "module:name". `needs` are modules without which it stays out, said aloud."""

    name: str
    function: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()


@dataclass(frozen=True)
class Slice:
    """What a contender did in one turn."""

    units: float
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.units / self.seconds


@dataclass(frozen=True)
class Measured:
    """All turns of a contender, and the most memory that each of its processes held, in MiB, the largest first."""

    name: str
    slices: Sequence[Slice]
    peaks_mib: Sequence[float]

    @property
    def peak_mib(self) -> float:
        """Of all processes: what they share counts more than once."""
        return sum(self.peaks_mib)

    @property
    def rate(self) -> float:
        """Units a second, the median of its turns."""
        return statistics.median(part.rate for part in self.slices)

    @property
    def cpu_share(self) -> float:
        """Cores kept busy."""
        return sum(part.cpu_seconds for part in self.slices) / sum(part.seconds for part in self.slices)

    def ratio(self, other: "Measured") -> float:
        """How many times as fast as the other: the median over rounds, in which both had the same neighbours."""
        pairs = zip(self.slices, other.slices, strict=True)
        return statistics.median(own.rate / its.rate for own, its in pairs)


def race(contenders: Sequence[Contender], *, rounds: int) -> list[Measured]:
    """Every contender that can take part, measured."""
    running = [Running(contender) for contender in contenders if _can_take_part(contender)]
    try:
        for one in running:
            one.wait()
        for number in range(rounds):
            for one in running if number % 2 == 0 else reversed(running):
                one.go()
        return [one.measured() for one in running]
    finally:
        for one in running:
            one.end()


def _can_take_part(contender: Contender) -> bool:
    lacking = [name for name in contender.needs if not _importable(name, contender.env)]
    if lacking:
        print(f"{contender.name}: left out, {', '.join(lacking)} cannot be imported", file=sys.stderr)
    return not lacking


def _importable(module: str, env: Mapping[str, str]) -> bool:
    done = subprocess.run([sys.executable, "-c", f"import {module}"], env={**os.environ, **env}, capture_output=True)
    return done.returncode == 0


class Running:
    """The process of a contender, seen from the race."""

    def __init__(self, contender: Contender) -> None:
        self.contender, self._slices = contender, list[Slice]()
        command = [sys.executable, "-m", "benchmarks.harness", contender.function, json.dumps(dict(contender.settings))]
        self._process = subprocess.Popen(
            command, env={**os.environ, **contender.env}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._peaks_mib: Sequence[float] = ()

    def wait(self) -> dict[str, Any]:
        """What it says at the end of a turn. Raises RuntimeError where it died instead."""
        line = _stream(self._process.stdout).readline()
        if not line:
            raise RuntimeError(f"{self.contender.name} ended with exit code {self._process.wait()}")
        return json.loads(line)

    def go(self) -> None:
        pipe = _stream(self._process.stdin)
        pipe.write("go\n")
        pipe.flush()
        said = self.wait()
        self._peaks_mib = said.pop("peaks_mib")
        self._slices.append(Slice(**said))

    def measured(self) -> Measured:
        return Measured(self.contender.name, self._slices, self._peaks_mib)

    def end(self) -> None:
        _stream(self._process.stdin).close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _stream(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


class Turns:
    """The same, seen from the contender. The first call ends its preparation, and is not timed."""

    def __init__(self, out: IO[str]) -> None:
        self._out, self._began = out, None

    def __call__(self, units: float) -> None:
        """End a turn in which so much was done, and wait for the next. Ends the process when the race is over."""
        seconds, cpu_seconds = time.perf_counter(), _cpu_seconds()
        if self._began is not None:
            seconds, cpu_seconds = seconds - self._began[0], cpu_seconds - self._began[1]
        said = {"units": units, "seconds": seconds, "cpu_seconds": cpu_seconds, "peaks_mib": _peaks_mib()}
        print(json.dumps(said), file=self._out, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # other people's loops have no way out for us
        self._began = time.perf_counter(), _cpu_seconds()


def _processes() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def _cpu_seconds() -> float:
    """Of this process and all below it."""
    used = 0.0
    for process in _processes():
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used += times.user + times.system + times.children_user + times.children_system
    return used


def _peaks_mib() -> list[float]:
    """Of this process and all below it that have not ended."""
    return sorted((_high_water(process.pid) for process in _processes()), reverse=True)


def _high_water(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0.0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return float(found[0]) / 1024 if found else 0.0


def table(measured: Sequence[Measured], unit: str) -> str:
    """A Markdown table; the last column says how many times as fast the first one is."""
    first = measured[0]
    lines = [f"| | {unit}/s | cores busy | peak MiB | ours is faster by |", "|---|---|---|---|---|"]
    for one in measured:
        lead = "" if one is first else f"{first.ratio(one):.2f}x"
        rate = f"{one.rate:,.{0 if one.rate >= 100 else 1}f}"
        lines.append(f"| {one.name} | {rate} | {one.cpu_share:.2f} | {one.peak_mib:,.0f} | {lead} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Race:
    """What is raced under one title: ours first. `goals` say by how much ours should be ahead of whom."""

    title: str
    contenders: Sequence[Contender]
    unit: str
    goals: Mapping[str, float] = field(default_factory=dict)
    """The rival that ours is least ahead of, by its goal, comes first: it alone is in the short suite."""
    remark: Callable[[Measured], str] | None = None
    """What more there is to say of ours."""
    takes_long: bool = False
    """Too much so for the short suite."""
    less: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the rival in the short suite, by which it has less to do there in a turn, at the same speed."""


@dataclass(frozen=True)
class Report:
    """A race that was run: its table, and a line for each goal that was missed."""

    text: str
    missed: Sequence[str]


def report(race_: Race, *, rounds: int) -> Report:
    measured = race(race_.contenders, rounds=rounds)
    remark = f" {race_.remark(measured[0])}" if race_.remark else ""
    missed = [f"{race_.title}: {line}" for line in short_of(measured, race_.goals)]
    told = "".join(f"\n- short of the goal: {line}" for line in missed)
    return Report(f"{race_.title}.{remark}\n\n{table(measured, race_.unit)}\n{told}", missed)


def short_of(measured: Sequence[Measured], goals: Mapping[str, float]) -> list[str]:
    """A line for each rival that the first contender does not lead by its goal."""
    first, rivals = measured[0], {one.name: one for one in measured[1:]}
    leads = {name: (first.ratio(rivals[name]), goal) for name, goal in goals.items() if name in rivals}
    return [f"{lead:.2f}x {name}, not {goal:.2f}x" for name, (lead, goal) in leads.items() if lead < goal]


def command_line(description: str | None, races: Callable[..., Iterable[Race]]) -> None:
    """The program of a module of races: `--shape` where they take one, and `--rounds`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["10M", "50M"], default="10M")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(machine())
    for one in races(given.shape):
        print(f"\n{report(one, rounds=given.rounds).text}", flush=True)


def main() -> None:
    """A contender's process. What it prints goes to stderr; stdout belongs to the race."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module, name = sys.argv[1].split(":")
    getattr(importlib.import_module(module), name)(Turns(out), **json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
