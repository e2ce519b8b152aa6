"""What is said of a Ray head that cannot start. The Ray here is one that was installed badly."""

from pathlib import Path

import pytest

from jobs.head import ensure, stop
from pipeline.errors import EnvironmentProblem


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("print('a port is taken'); raise SystemExit(7)", "ended at once, with exit code 7. It said: a port is taken"),
        ("import os; os.kill(os.getpid(), 9)", "ended at once, by SIGKILL. It said nothing; Ray's own logs are in "),
    ],
)
def test_a_head_that_ends_at_once_is_told_of_with_how_and_its_last_words(
    does: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scripts = tmp_path / "ray" / "scripts"
    scripts.mkdir(parents=True)
    for name, text in (("../__init__.py", ""), ("__init__.py", ""), ("scripts.py", does)):
        (scripts / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        with pytest.raises(EnvironmentProblem) as error:
            ensure(tmp_path / "home", lambda _: None)
        assert told in str(error.value)
    finally:
        stop(tmp_path / "home")
