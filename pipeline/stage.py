"""The one abstraction of the pipeline: a stage is a frozen recipe that turns input artifacts into one artifact."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeGuard, TypeVar

from pipeline.identity import canonical, fingerprint, in_key, knob
from pipeline.store import Store
from pipeline.tracking import Silent, Tracker

A = TypeVar("A")
T = TypeVar("T")
R = TypeVar("R")

Told = Callable[[int], None]
"""Hears how many items are done, each time that it is more of them."""


class Map(Protocol):
    """Apply a picklable function to items, in parallel where the launcher can, results in the order of the items."""

    def __call__(self, function: Callable[[T], R], items: Sequence[T], told: Told, /) -> list[R]: ...


def plain_map(function: Callable[[T], R], items: Sequence[T], told: Told, /) -> list[R]:
    """`Map` as a loop in this process."""
    results: list[R] = []
    for item in items:
        results.append(function(item))
        told(len(results))
    return results


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one stage asks of a machine. `cpus=0` means: all there are. `ranks`: it can use more than one process."""

    cpus: int = 1
    gpus: int = 0
    ranks: bool = False


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """What any process that works on a stage may touch: its inputs, a folder that survives a kill, and a tracker.

    `work` is deleted once the artifact is published. `key` is the stage's own; `keys` has the key of every finished
    stage, by stage name.
    """

    store: Store
    kind: str
    key: str
    keys: Mapping[str, str]
    work: Path
    tracker: Tracker = field(default_factory=Silent)
    cpus: int = 1

    def open(self, stage: "Stage[A]") -> A:
        """The finished artifact of an input stage, every byte checked."""
        return stage.load(self.store.open(stage.kind, self.keys[stage.name]))


class Gang(Protocol):
    """Run a function of a stage on every rank of a gang that RANK and WORLD_SIZE describe, and wait for all of them.

    What the ranks have to say to the stage they leave in `work`.
    """

    def __call__(self, function: Callable[[RankContext], None], ctx: "Context", /) -> None: ...


def alone(function: Callable[[RankContext], None], ctx: "Context", /) -> None:
    """`Gang` of one: this process."""
    function(ctx)


@dataclass(frozen=True, kw_only=True)
class Context(RankContext):
    """What a running stage may touch besides: its own artifact, and hands for parallel work.

    `out` becomes the artifact. `notes` are kept in the manifest but not in the digest: put timings and machine facts
    there, never into a file of the artifact.
    """

    out: Path
    map: Map = plain_map
    gang: Gang = alone
    notes: dict[str, Any] = field(default_factory=dict)

    def on_ranks(self, function: Callable[[RankContext], None]) -> None:
        """Run a function of the stage on as many ranks as the launcher has; a plain call where that is one."""
        try:
            self.gang(function, self)
        finally:  # they may have kept the journal on another machine
            self.store.pull_journal(self.kind, self.key)

    def spread(self, function: Callable[[T], R], items: Sequence[T], doing: str) -> list[R]:
        """`map`, which says how far it is."""
        self.tracker.progress(0, len(items), doing)
        return self.map(function, items, lambda done: self.tracker.progress(done, len(items), doing))

    def dataset(self, stage: "Stage[Any]", split: str) -> dict[str, str]:
        """An input as experiment trackers list datasets: `{"name", "source", "digest", "context"}`, for `notes`."""
        key = self.keys[stage.name]
        manifest = self.store.find(stage.kind, key)
        assert manifest is not None, "an input is built before its user"
        source = str(self.store.path(stage.kind, key))
        return {"name": f"{stage.name}-{split}", "source": source, "digest": manifest.digest, "context": split}


@dataclass(frozen=True, kw_only=True)
class Stage(ABC, Generic[A]):
    """Fields that are stages are inputs; fields made with `knob` are execution; every other field is identity."""

    VERSION: ClassVar[int] = 1
    """Raise this when `run` starts to make something else from the same fields."""

    label: str = knob("")
    """Tells two stages of one kind apart on screen."""
    section: str = knob("")
    """Where in a config its field `config` stands, if not under the name of its kind."""

    @abstractmethod
    def run(self, ctx: Context) -> None:
        """Write the artifact's files under `ctx.out`."""

    @abstractmethod
    def load(self, path: Path) -> A:
        """Open the artifact that `run` wrote."""

    @property
    def resources(self) -> Resources:
        return Resources()

    def sources(self) -> Mapping[str, str]:
        """`{name: content digest}` of what is read from outside the store. Raises DataError where it cannot be read."""
        return {}

    @property
    def kind(self) -> str:
        """What is made, in one word: the folder of its artifacts."""
        return type(self).__name__.lower().removesuffix("stage")

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.label}" if self.label else self.kind

    @property
    def inputs(self) -> "dict[str, Stage[Any]]":
        """`{field name: stage}` of every input; the stages of a tuple are numbered, as in `repeats.0`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        several = {name: value for name, value in values.items() if _are_stages(value)}
        numbered = {f"{name}.{n}": stage for name, value in several.items() for n, stage in enumerate(value)}
        return {name: value for name, value in values.items() if isinstance(value, Stage)} | numbered

    @property
    def settings(self) -> dict[str, Any]:
        """Its own part of the key: which stage it is, and every field that counts."""
        own = {
            f.name: canonical(value)
            for f in fields(self)
            if in_key(f, self) and not isinstance(value := getattr(self, f.name), Stage) and not _are_stages(value)
        }
        return {"stage": self.kind, "version": self.VERSION, **own}

    def recipe(self, input_digests: Mapping[str, str]) -> dict[str, Any]:
        """What the key is made of. An input enters by the digest of its bytes, so that equal bytes stop a rebuild."""
        return {
            **self.settings,
            "sources": dict(self.sources()),
            "inputs": dict(input_digests),
        }

    def key(self, input_digests: Mapping[str, str]) -> str:
        return fingerprint(self.recipe(input_digests))


def _are_stages(value: object) -> TypeGuard[tuple[Stage[Any], ...]]:
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(item, Stage) for item in value)
