"""A linear rival of the classifier: what it answers to the test texts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.baselines import BASELINES, BaselineName
from pipeline.labelling import Labelling, rounded
from pipeline.stage import Context, Stage
from pipeline.stages.labels import Labels
from pipeline.targets import Targets

ANSWERS = "answers.npy"


@dataclass(frozen=True)
class BaselineAnswers:
    """What a rival answers to the test texts, in their order."""

    path: Path

    def load(self) -> Targets:
        """As `Labels` has the targets of the test texts."""
        return np.load(self.path / ANSWERS)


@dataclass(frozen=True, kw_only=True)
class Baseline(Stage[BaselineAnswers]):
    """Learns from the labelled texts alone, so whatever becomes of the network, it is trained once."""

    rival: BaselineName
    labels: Stage[Labels]

    def load(self, path: Path) -> BaselineAnswers:
        return BaselineAnswers(path)

    def run(self, ctx: Context) -> None:
        labels, rival = ctx.open(self.labels), BASELINES[self.rival]
        train, validation, test = (labels.split(name) for name in ("train", "validation", "test"))
        answers = rival.predict(train, validation, test.texts, ctx.tracker.progress)
        np.save(ctx.out / ANSWERS, answers)
        found = Labelling(test.targets, answers, len(labels.names))
        ctx.notes["metrics"] = {f"test/{kind}": rounded(getattr(found, kind)) for kind in ("accuracy", "macro_f1")}
        ctx.notes["headline"] = f"test macro-F1 {found.macro_f1:.3f}"
        ctx.notes["datasets"] = [ctx.dataset(self.labels, split) for split in ("train", "validation", "test")]
