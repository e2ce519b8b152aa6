"""A folder whose pipeline is sent to a cluster, with secrets lying about that must stay where they are."""

from pathlib import Path

HERE = Path.cwd()

CANARIES = {
    name: f"canary-{number}-must-stay-home"
    for number, name in enumerate(
        ["MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "SOME_SETTING", "IN_A_FILE"]
    )
}


def furnish(folder: Path) -> None:
    """A config, its data, and what lies about in the folders of people."""
    (folder / "data").mkdir(parents=True)
    (folder / "smoke.yaml").write_text(f"extends: {HERE}/configs/smoke.yaml\ncorpus:\n  path: data/corpus.txt\n")
    (folder / "data" / "corpus.txt").write_bytes((HERE / "data" / "smoke" / "corpus.txt").read_bytes())
    for name in (".env", ".git/config", ".venv/bin/settings", "data/other.txt", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(CANARIES["SOME_SETTING"])
    (folder / "secret").write_text(CANARIES["IN_A_FILE"])
