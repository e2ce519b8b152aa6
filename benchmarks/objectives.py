"""What to pretrain for and how to pool: the test macro-F1 of each on a few tasks.

`python -m benchmarks.objectives --corpus FILE --tasks FOLDER --only TASK TASK`, other arguments as of benchmarks.tasks.
The bases differ in `pretrain.objective` alone; a fine-tuned body reads both ways where its base did, or where the row
says so. One seed.
"""

import statistics
from collections.abc import Sequence

from benchmarks.tasks import Study, arguments

ROWS = {
    "next token, last": ("next_token", "last", False),
    "next token, mean": ("next_token", "mean", False),
    "next token, mean, then both ways": ("next_token", "mean", True),
    "masked next token, mean": ("masked_next_token", "mean", False),
    "masked, mean": ("masked", "mean", False),
    "masked, attention": ("masked", "attention", False),
    "masked, first": ("masked", "first", False),
}
"""What a row is called -> objective, pooling, whether fine-tuning opens a causal body to both ways."""


def score(study: Study, tasks: Sequence[str], objective: str, pooling: str, both_ways: bool) -> list[float]:
    settings = (
        f"pretrain.objective={objective}",
        f"finetune.pooling={pooling}",
        f"finetune.bidirectional={str(both_ways).lower()}",
        "export=null",
        "evaluate.baselines=[]",
        "evaluate.contamination=false",
    )
    return [study.run(task, *settings)["macro_f1"] for task in tasks]


def main() -> None:
    given, study = arguments()
    tasks = given.only or study.names
    print(f"| pretrained for, pooled by | {' | '.join(tasks)} | mean |\n|---|{'---|' * (len(tasks) + 1)}")
    for name, row in ROWS.items():
        scores = score(study, tasks, *row)
        print(f"| {name} | {' | '.join(f'{s:.3f}' for s in (*scores, statistics.mean(scores)))} |", flush=True)


if __name__ == "__main__":
    main()
