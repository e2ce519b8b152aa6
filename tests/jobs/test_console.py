"""What a person reads in a terminal: paths and names as they are, whatever they look like to the terminal's library."""

import pytest

from jobs.plan import print_plan


def test_a_plan_shows_patterns_as_they_are(capsys: pytest.CaptureFixture[str]):
    reason = "data/[ab]*.txt: other bytes [/x]"
    print_plan([{"name": "corpus", "key": None, "status": "built", "reasons": [reason]}])
    assert reason in capsys.readouterr().out
