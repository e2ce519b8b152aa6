"""The parent of a driver on a cluster: starts it again when something kills it, passes signals and its exit code on.

    python -m jobs.supervise --home PATH [--env NAME]... [--env NAME=file:PATH]... -- run config.yaml --json

It imports nothing but the standard library, so that it outlives whatever a driver dies of.
"""

import argparse
import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

ENVIRONMENT, FAILED, CANCELLED = 3, 5, 6
"""Exit codes of its own: as pipeline/errors.py has them."""

WANTED = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""Signals by which somebody ends a driver on purpose. Every other one is an accident, and the driver starts again."""

LONG_LIFE_SECONDS = 600.0
"""A driver that lived this long had got somewhere: its accident is counted as the first."""

PR_SET_PDEATHSIG = 1
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class NotThere(Exception):
    """A variable or file that the driver was promised is not on this machine."""


@dataclass
class Supervisor:
    """Runs one command until it ends by itself, is ended on purpose, or has died too often."""

    command: Sequence[str]
    environment: Mapping[str, str]
    restarts: int = 5
    pause_seconds: float = 1.0
    """The first pause before a restart; each one is twice the one before."""
    pass_on: bool = True
    """Whether a signal is passed on. Not where who sends it signals the whole tree: the driver takes a second one as
    the wish to end at once, without a checkpoint."""
    _child: "subprocess.Popen[bytes] | None" = field(default=None, init=False)
    _asked: int | None = field(default=None, init=False)

    def run(self) -> int:
        """The exit code of the command; 5 where it kept dying, 6 where it was ended while it was not running."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        deaths = 0
        while self._asked is None:
            began = time.monotonic()
            code = self._once()
            if code >= 0:
                return code
            name = _name(-code)
            if self._asked is not None or -code in WANTED:
                _say(f"the driver was ended by {name}")
                return CANCELLED
            deaths = 1 if time.monotonic() - began > LONG_LIFE_SECONDS else deaths + 1
            if deaths > self.restarts:
                _say(f"the driver was killed by {name}, {deaths} times in a row; giving up. See what is said above")
                return FAILED
            self._pause(name, deaths)
        return CANCELLED

    def _once(self) -> int:
        with subprocess.Popen(self.command, env=self.environment, preexec_fn=_end_with_parent) as child:  # noqa: S603 - our own words
            self._child = child
            if self._asked is not None:  # asked for between the last look and the start
                child.send_signal(self._asked)
            code = child.wait()
        self._child = None
        return code

    def _pause(self, name: str, deaths: int) -> None:
        seconds = self.pause_seconds * 2 ** (deaths - 1)
        _say(f"the driver was killed by {name}; starting it again in {seconds:g} s ({deaths} of {self.restarts})")
        until = time.monotonic() + seconds
        while self._asked is None and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._asked = number
        if self._child is not None and self.pass_on:
            self._child.send_signal(number)


def _end_with_parent() -> None:
    """In the child: be asked to end, as by SIGTERM, if the supervisor is killed. Linux only; elsewhere it lives on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def variables(wanted: Sequence[str]) -> dict[str, str]:
    """What `--env` promises the driver. Raises NotThere for a variable or a file that this machine does not have."""
    found = {}
    for text in wanted:
        name, _, source = text.partition("=")
        if source:
            found[name] = _read(name, source.removeprefix("file:"))
        elif name not in os.environ:
            raise NotThere(
                f"{name} is not set in the environment of the cluster. Set it there, or give {name}=file:PATH"
            )
    return found


def _read(name: str, path: str) -> str:
    try:
        return Path(path).expanduser().read_text().strip()
    except OSError as error:
        raise NotThere(f"{name}: {path} cannot be read on the cluster: {error.strerror}") from None


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(text: str) -> None:
    sys.stderr.write(f"[supervise] {text}\n")
    sys.stderr.flush()


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jobs.supervise", description=__doc__)
    parser.add_argument("--home", default=os.environ.get("GRISTMILL_HOME") or "~/gristmill")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=file:PATH]")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--pause", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument(
        "--tree-signalled", action="store_true", help="who ends this ends its children too, as Ray does"
    )
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = _options(arguments)
    try:
        secrets = variables(options.env)
    except NotThere as problem:
        _say(str(problem))
        return ENVIRONMENT
    home = Path(options.home).expanduser().absolute()
    environment = {**os.environ, **secrets, "GRISTMILL_HOME": str(home)}
    command = [sys.executable, "-m", "jobs.cli", *options.command]
    return Supervisor(command, environment, options.restarts, options.pause, not options.tree_signalled).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
