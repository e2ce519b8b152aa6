"""Several labelled tasks on one base, with one recipe for all.

`python -m benchmarks.tasks --corpus FILE --tasks FOLDER`. The folder holds files of {text, label, split}, named after
their tasks. Each task is fine-tuned with three seeds and once from random weights, beside the linear rivals that
`evaluate` has; then the networks are scored alone, without the n-grams beside them. The base is made once; what is
finished is not made again, so a study that was cut off goes on.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = Path("configs/english.yaml")
SUFFIX = ".jsonl.zst"
ALONE = ("ngrams=null", "export=null", "evaluate.baselines=[]", "evaluate.contamination=false")
"""The same networks by themselves."""


@dataclass(frozen=True)
class Study:
    """Where the texts are, and what is asked of every run."""

    corpus: Path
    tasks: Path
    settings: tuple[str, ...] = ()
    in_time_order: tuple[str, ...] = ()
    """Tasks whose rows are, with a test that is later."""

    @property
    def names(self) -> list[str]:
        return sorted(path.name.removesuffix(SUFFIX) for path in self.tasks.glob(f"*{SUFFIX}"))

    def run(self, task: str, *settings: str) -> dict[str, Any]:
        """The JSON of one run; its progress goes to stderr."""
        own = (
            f"name={task}",
            f"corpus.path={self.corpus.absolute()}",
            f"labels.path={self.tasks.absolute() / (task + SUFFIX)}",
            "labels.split=split",
            f"labels.in_time_order={str(task in self.in_time_order).lower()}",
        )
        command = [str(Path(sys.executable).with_name("gristmill")), "run", str(CONFIG), "--inline", "--json"]
        command += [part for setting in (*own, *settings, *self.settings) for part in ("--set", setting)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Row:
    """Test macro-F1 of a task: ours by seed, and its rivals'. `ece` is of the first seed, as served.

    `network` and `random_network` read no n-grams.
    """

    task: str
    ours: Mapping[str, Any]
    tfidf: float
    svm: float
    random: float
    ece: float
    network: float
    random_network: float

    @classmethod
    def of(cls, task: str, result: Mapping[str, Any], alone: Mapping[str, Any]) -> "Row":
        """`alone` is the result without n-grams."""
        rivals = {rival["name"]: rival["macro_f1"] for rival in result["baselines"]}
        return cls(
            task=task,
            ours=result["seeds"]["macro_f1"],
            tfidf=rivals["tfidf-logreg"],
            svm=rivals["linear-svm"],
            random=result["random_init"]["macro_f1"],
            ece=result["ece_calibrated"],
            network=alone["seeds"]["macro_f1"]["mean"],
            random_network=alone["random_init"]["macro_f1"],
        )

    def __str__(self) -> str:
        ours = (self.ours["mean"], self.ours["std"])
        cells = (*ours, self.tfidf, self.svm, self.random, self.ece, self.network, self.random_network)
        return f"| {self.task} | {' | '.join(f'{cell:.3f}' for cell in cells)} |"


COLUMNS = (
    "task",
    "classifier, mean",
    "standard deviation",
    "TF-IDF + LR",
    "linear SVM",
    "from random weights",
    "ECE",
    "without n-grams",
    "from random weights, without n-grams",
)


def verdict(rows: Sequence[Row]) -> str:
    """On how many tasks the mean over seeds leads."""
    leads = {
        "the best linear rival": sum(row.ours["mean"] > max(row.tfidf, row.svm) for row in rows),
        "TF-IDF + logistic regression": sum(row.ours["mean"] > row.tfidf for row in rows),
        "random weights": sum(row.ours["mean"] > row.random for row in rows),
        "random weights, both without n-grams": sum(row.network > row.random_network for row in rows),
    }
    return "; ".join(f"above {rival} on {n} of {len(rows)}" for rival, n in leads.items())


def parser(description: str | None) -> argparse.ArgumentParser:
    """What studies of these tasks have in common."""
    common = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_argument("--corpus", type=Path, required=True, help="text to pretrain on")
    common.add_argument("--tasks", type=Path, required=True, help=f"folder of TASK{SUFFIX}")
    common.add_argument("--only", nargs="+", metavar="TASK", help="leave out the others")
    common.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of gristmill run")
    return common


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--seeds", type=int, default=3, help="2 or more, for a deviation")
    own.add_argument("--in-time-order", nargs="+", default=[], metavar="TASK", help="rows are, and the test is later")
    given = own.parse_args()
    if given.seeds < 2:
        own.error("--seeds: a standard deviation needs 2 or more")
    study = Study(given.corpus, given.tasks, tuple(given.set), tuple(given.in_time_order))
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    rows = []
    for task in given.only or study.names:
        repeated = (f"evaluate.seeds={given.seeds}", "evaluate.random_init=true")
        rows.append(Row.of(task, study.run(task, *repeated), study.run(task, *repeated, *ALONE)))
        print(rows[-1], flush=True)
    print(f"\n{verdict(rows)}")


if __name__ == "__main__":
    main()
