"""The token that a Ray of this machine asks for, and what is said of a head that cannot start.

The Ray here is one that was installed badly.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.head import ensure, stop
from jobs.launch_ray import token_settings
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


def test_those_who_need_a_token_first_all_find_one_and_the_same_that_only_the_user_can_read(tmp_path: Path):
    def read(_: int) -> str:
        return Path(token_settings(tmp_path)["RAY_AUTH_TOKEN_PATH"]).read_text()

    with ThreadPoolExecutor(16) as pool:
        [token] = set(pool.map(read, range(16)))
    assert len(token) == 64
    assert [(entry.name, entry.stat().st_mode & 0o777) for entry in os.scandir(tmp_path)] == [("ray-token", 0o600)]
