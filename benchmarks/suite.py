"""Every race, into the tables of RESULTS.md: `make bench`. With --short (`make bench-short`), against regressions.

A race that misses a goal ends the short suite with exit code 1. `--only NAME` runs some, as pretrain or text.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path

from benchmarks import classify, finetune, generate, pretrain, text
from benchmarks.harness import Contender, Race, report
from benchmarks.timing import machine

RESULTS = Path("benchmarks/RESULTS.md")
RACES: dict[str, Callable[[str], Iterable[Race]]] = {
    "pretrain": pretrain.races,
    "finetune": finetune.races,
    "classify": classify.races,
    "text": text.races,
    "generate": generate.races,
}
LARGER = ("pretrain",)
"""Raced at 50M too."""


def all_races(name: str) -> Iterator[Race]:
    for shape in ("10M", "50M") if name in LARGER else ("10M",):
        yield from RACES[name](shape)


def full(names: Iterable[str], rounds: int) -> None:
    """Race, and put the tables where they belong."""
    for name in names:
        parts = [report(race, rounds=rounds).text for race in all_races(name)]
        head = f"`python -m benchmarks.{name}`, {date.today().isoformat()}, {machine()}. Medians of {rounds} rounds."
        write(name, "\n\n".join([head, *parts]))
        print("\n\n".join(parts), flush=True)


def write(name: str, body: str) -> None:
    """Replace the section of that name, or add it at the end."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    held = RESULTS.read_text(encoding="utf-8")
    before, found, after = held.partition(begin)
    section = f"{begin}\n## Speed: {name}\n\n{body.strip()}\n{end}"
    whole = before + section + after.partition(end)[2] if found else f"{held.rstrip()}\n\n{section}\n"
    RESULTS.write_text(whole, encoding="utf-8")


def short(names: Iterable[str]) -> list[str]:
    """One round of ours and one rival in each race; what was missed in three more, as one may be missed by chance."""
    missed: list[str] = []
    for name in names:
        for race in RACES[name]("10M"):
            if race.goals and not race.takes_long:
                title = f"{race.title}; the rival has less to do" if race.less else race.title
                two = replace(race, title=title, contenders=field(race), remark=None)
                told = report(two, rounds=1)
                print(told.text, flush=True)
                if told.missed:
                    told = report(two, rounds=3)
                    print(told.text, flush=True)
                missed += told.missed
    return missed


def field(race: Race) -> list[Contender]:
    """Ours, and the rival of its first goal: what slows us down shows beside any of them."""
    rival = next(one for one in race.contenders if one.name == next(iter(race.goals)))
    return [race.contenders[0], replace(rival, settings={**rival.settings, **race.less})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(RACES), default=list(RACES))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(machine())
    if not given.short:
        full(given.only, given.rounds)
    elif missed := short(given.only):
        sys.exit("\n".join(["missed:", *missed]))


if __name__ == "__main__":
    main()
