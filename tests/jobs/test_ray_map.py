import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SCRIPT = Path(__file__).with_name("map_script.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that owns a Ray says of the work it has spread."""
    folder = tmp_path_factory.mktemp("map")
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def test_results_are_in_the_order_of_the_items(found: dict[str, Any]):
    assert found["squares"] == [number * number for number in range(9)]
    assert found["nothing"] == []


def test_each_item_that_is_done_is_told(found: dict[str, Any]):
    assert found["told"][:9] == list(range(1, 10))


def test_a_task_is_kept_to_one_thread_of_tokenizers(found: dict[str, Any]):
    assert found["parallelism"] == ["false"] * 2


def test_a_failure_is_raised_and_the_items_that_wait_are_not_begun(found: dict[str, Any]):
    assert found["error"].endswith("ValueError: the first of them")
    assert found["done"] < 6, "two at a time, and what runs is stopped"


def test_a_stage_that_wants_more_slots_than_any_machine_has_takes_those_of_the_largest(found: dict[str, Any]):
    assert found["large"] == 2


def test_a_full_disk_of_a_task_is_told_without_the_task(found: dict[str, Any]):
    assert found["full"].startswith("a/file: No space left on device.")
    assert "Traceback" not in found["full"]
