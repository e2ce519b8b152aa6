"""What each way to fine-tune scores on validation texts, by which to choose one.

`python -m benchmarks.methods --corpus FILE --tasks FOLDER --only TASK TASK`, other arguments as of benchmarks.tasks. A
row changes the named settings of configs/english.yaml's fine-tuning and nothing else; no n-grams stand beside the
network, and it has one seed. Scores are of the best epoch. What is finished is not made again.
"""

from typing import Any

from benchmarks.tasks import ALONE, Study, parser
from jobs.home import home
from pipeline.store import Store

ROWS = (
    (),
    ("average=0",),
    ("layer_lr_decay=0.9",),
    ("label_smoothing=0.1",),
    ("unfreeze=0.3",),
    ("method=lora", "lora_alpha=256"),
    ("r_drop=1",),
)


def validation(result: dict[str, Any]) -> tuple[float, float]:
    """Macro-F1 and log loss (nats) of the best epoch on the validation texts."""
    (key,) = (stage["key"] for stage in result["stages"] if stage["name"] == "finetune")
    manifest = Store(home()).find("finetune", key)
    assert manifest is not None, "the run has built it"
    measured = manifest.meta["notes"]["metrics"]
    return measured["val/macro_f1"], measured["val/log_loss"]


def main() -> None:
    given = parser(__doc__).parse_args()
    study = Study(given.corpus, given.tasks, tuple(given.set))
    print("| task | changed | validation macro-F1 | log loss |\n|---|---|---|---|")
    for task in given.only or study.names:
        for changed in ROWS:
            result = study.run(task, *ALONE, *(f"finetune.{setting}" for setting in changed))
            scores = " | ".join(f"{score:.3f}" for score in validation(result))
            print(f"| {task} | {', '.join(f'`{setting}`' for setting in changed)} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
