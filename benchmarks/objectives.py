"""What to pretrain for and how to pool: the test macro-F1 of each on a few tasks.

`python -m benchmarks.objectives --corpus FILE --tasks FOLDER --only TASK TASK`, other arguments as of benchmarks.tasks.
All bases see as many tokens of the corpus, none goes on with the texts of a task, and no n-grams stand beside it. A
fine-tuned body reads both ways where its base did, or where the row says so. One seed. One phase hides 15 % of the
tokens, at the rates of configs/english.yaml's `pretrain`; a second one 30 %, at those of its `midtrain`.
"""

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.tasks import Study, parser

SECOND_PHASE = 0.4
"""Of the tokens, where there are two phases."""
COMMON = ("adapt=null", "ngrams=null", "export=null", "evaluate.baselines=[]", "evaluate.contamination=false")


def rows(tokens: int) -> Mapping[str, Sequence[str]]:
    """What a row is called -> what is set for it."""

    def one(objective: str, pooling: str, both_ways: bool = False) -> list[str]:
        base = [f"pretrain.objective={objective}", f"pretrain.tokens={tokens}", "midtrain=null"]
        return [*base, f"finetune.pooling={pooling}", f"finetune.bidirectional={str(both_ways).lower()}"]

    later = round(SECOND_PHASE * tokens)
    phases = [f"pretrain.tokens={tokens - later}", f"midtrain.tokens={later}", "finetune.pooling=mean"]
    return {
        "next token, last": one("next_token", "last"),
        "next token, mean": one("next_token", "mean"),
        "next token, mean, then both ways": one("next_token", "mean", both_ways=True),
        "next token, then masked next token, mean": phases,
        "masked next token, mean": one("masked_next_token", "mean"),
        "masked, mean": one("masked", "mean"),
        "masked, attention": one("masked", "attention"),
        "masked, first": one("masked", "first"),
    }


def score(study: Study, tasks: Sequence[str], settings: Sequence[str]) -> list[float]:
    return [study.run(task, *settings, *COMMON)["macro_f1"] for task in tasks]


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--tokens", type=int, default=8_000_000, help="of the corpus, that each base sees")
    given = own.parse_args()
    study = Study(given.corpus, given.tasks, tuple(given.set))
    tasks = given.only or study.names
    print(f"| pretrained for, pooled by | {' | '.join(tasks)} | mean |\n|---|{'---|' * (len(tasks) + 1)}")
    for name, settings in rows(given.tokens).items():
        scores = score(study, tasks, settings)
        print(f"| {name} | {' | '.join(f'{s:.3f}' for s in (*scores, statistics.mean(scores)))} |", flush=True)


if __name__ == "__main__":
    main()
