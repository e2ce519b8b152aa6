"""What a person reads in a terminal: paths and names as they are, whatever they look like to the terminal's library."""

import pytest

from jobs.console import print_result
from jobs.plan import print_plan


def test_a_plan_shows_patterns_as_they_are(capsys: pytest.CaptureFixture[str]):
    reason = "data/[ab]*.txt: other bytes [/x]"
    print_plan([{"name": "corpus", "key": None, "status": "built", "reasons": [reason]}])
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uri", "told"),
    [("sqlite:///mine.db", ""), ("http://me:secret@tracker:5000", "MLFLOW_TRACKING_URI='http://me:***@tracker:5000' ")],
)
def test_the_commands_after_a_run_find_its_model(uri: str, told: str, capsys: pytest.CaptureFixture[str]):
    seconds = dict.fromkeys(("start", "between", "stages", "artifacts", "checkpoints", "tracking"), 0.1)
    result = {"name": "toy", "tracking_uri": uri, "wall_seconds": 1.0, "seconds": seconds}
    print_result(result, "sqlite:///mine.db", writes=True)
    said = capsys.readouterr().out
    assert f"\n  {told}gristmill ui\n" in said
    assert "secret" not in said
