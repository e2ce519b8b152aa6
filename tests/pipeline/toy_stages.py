"""Stages small enough to see through: write a number, add two numbers, read a file and settings, die half way."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import StageFailed
from pipeline.identity import added, knob
from pipeline.stage import Context, Stage


@dataclass(frozen=True, kw_only=True)
class Number(Stage[int]):
    value: int
    comment: str = knob("")
    unit: str = added("metre")

    def run(self, ctx: Context) -> None:
        ctx.tracker.metrics({"value": self.value}, step=0)
        (ctx.out / "n.txt").write_text(str(abs(self.value)))

    def load(self, path: Path) -> int:
        return int((path / "n.txt").read_text())


@dataclass(frozen=True, kw_only=True)
class Sum(Stage[int]):
    left: Stage[int]
    right: Stage[int]
    scale: int = 1

    def run(self, ctx: Context) -> None:
        (ctx.out / "n.txt").write_text(str(self.scale * (ctx.open(self.left) + ctx.open(self.right))))

    def load(self, path: Path) -> int:
        return int((path / "n.txt").read_text())


@dataclass(frozen=True, kw_only=True)
class Fit:
    rate: float


@dataclass(frozen=True, kw_only=True)
class Fitted(Stage[float]):
    config: Fit
    folder: Path = knob()
    overwrites: bool = knob(False)

    def sources(self) -> dict[str, str]:
        return {"config.json": (self.folder / "config.json").read_text()}

    def run(self, ctx: Context) -> None:
        if self.overwrites:
            (self.folder / "config.json").write_text("written meanwhile")
        (ctx.out / "n.txt").write_text(str(self.config.rate))

    def load(self, path: Path) -> float:
        return float((path / "n.txt").read_text())


@dataclass(frozen=True, kw_only=True)
class Dies(Stage[int]):
    def run(self, ctx: Context) -> None:
        (ctx.out / "half.bin").write_bytes(b"half")
        raise StageFailed("power cut")

    def load(self, path: Path) -> int:
        return 0


def sum_of(left: int, right: int, **fields: int) -> Sum:
    return Sum(left=Number(value=left, label="left"), right=Number(value=right, label="right"), **fields)
