import sys

import pytest

from model import variants


def test_the_names_of_a_registry_are_the_files_in_its_folder():
    assert variants.names("model.decoding") == ["greedy", "temperature", "top_k", "top_p"]


def test_an_unknown_name_lists_the_choices_and_imports_nothing():
    with pytest.raises(ValueError, match=r"choose one of .*classification, masked, .*, multi_label, next_token"):
        variants.load("model.objectives", "this")
    assert "model.objectives.this" not in sys.modules
