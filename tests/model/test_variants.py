import sys
from pathlib import Path

import pytest

from model import variants


def test_the_names_of_a_registry_are_the_public_files_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for file in ("__init__", "second", "first", "_shared"):
        (tmp_path / "toy_registry").mkdir(exist_ok=True)
        (tmp_path / "toy_registry" / f"{file}.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert variants.names("toy_registry") == ["first", "second"]


def test_an_unknown_name_lists_the_choices_and_imports_nothing():
    with pytest.raises(ValueError, match=r"choose one of .*classification, .*next_token"):
        variants.load("model.objectives", "this")
    assert "model.objectives.this" not in sys.modules
