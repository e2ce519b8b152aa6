"""The quickstart over several seeds, beside TF-IDF and the same body from random weights: `python -m benchmarks.seeds`.

About six minutes a seed on two cores; corpus, tokenizer and shards are built once. Arguments go to `gristmill run`.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
COLUMNS = ("classifier", "random weights", "TF-IDF + LR", "ECE")


def run(seed: int) -> tuple[float, ...]:
    """Test macro-F1 of the classifier, the same body from random weights, and the baseline; our calibrated ECE."""
    command = [str(Path(sys.executable).with_name("gristmill")), "run", "configs/quickstart.yaml", "--json"]
    command += ["--set", f"seed={seed}", "--set", "evaluate.random_init=true", *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    rivals = result["random_init"]["macro_f1"], result["baseline"]["macro_f1"]
    return result["macro_f1"], *rivals, result["ece_calibrated"]


def main() -> None:
    rows = {seed: run(seed) for seed in SEEDS}
    print(f"| seed | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for seed, scores in rows.items():
        print(f"| {seed} | {' | '.join(f'{score:.3f}' for score in scores)} |")
    means = [statistics.mean(column) for column in zip(*rows.values(), strict=True)]
    print(f"| mean | {' | '.join(f'{mean:.3f}' for mean in means)} |")


if __name__ == "__main__":
    main()
