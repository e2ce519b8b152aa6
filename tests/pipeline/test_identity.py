import subprocess
import sys
from dataclasses import dataclass, field, replace
from enum import Enum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.identity import added, canonical, changes, fingerprint, knob
from tests.pipeline.toy_stages import Number, sum_of

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    width: int = 4
    batch: int = knob(8)


@dataclass(frozen=True)
class Recipe:
    inner: Inner = Inner()
    lr: float = 0.1
    colour: Colour = Colour.RED
    workers: int = knob(1)
    later: str = added("birth")


@given(PLAIN)
def test_a_plain_value_has_one_fingerprint(value: object):
    assert fingerprint(value) == fingerprint(value)
    assert canonical(canonical(value)) == canonical(value)


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_the_order_of_a_mapping_does_not_matter(value: dict[str, int]):
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"inner": Inner(width=5)}, {"later": "other"}])
def test_an_identity_field_changes_the_fingerprint(change: dict):
    assert fingerprint(replace(Recipe(), **change)) != fingerprint(Recipe())


@pytest.mark.parametrize("change", [{"workers": 9}, {"inner": Inner(batch=1)}])
def test_a_knob_does_not_at_any_depth(change: dict):
    assert fingerprint(replace(Recipe(), **change)) == fingerprint(Recipe())


def test_a_later_field_at_its_birth_value_leaves_old_keys_alone():
    assert "later" not in canonical(Recipe())


@pytest.mark.parametrize("bad", [print, object(), {1, 2}, b"bytes", {1: "a"}])
def test_a_value_without_stable_identity_is_refused(bad: object):
    with pytest.raises(TypeError, match="no stable identity"):
        fingerprint({"x": bad})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused(bad: float):
    with pytest.raises(ValueError, match="finite"):
        fingerprint(bad)


def test_a_whole_float_is_not_its_integer_by_accident():
    assert fingerprint(1.0) != fingerprint("1.0")


def test_fingerprints_agree_between_processes_with_other_hash_seeds():
    code = "from tests.pipeline.toy_stages import *; print(sum_of(1, 2).key({'left': 'a', 'right': 'b'}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in "12"
    }
    assert seen == {sum_of(1, 2).key({"right": "b", "left": "a"})}


def test_a_stage_is_keyed_by_its_fields_and_the_digests_of_its_inputs():
    key = sum_of(1, 2).key({"left": "a", "right": "b"})
    assert sum_of(1, 2, scale=2).key({"left": "a", "right": "b"}) != key
    assert sum_of(1, 2).key({"left": "a", "right": "c"}) != key
    assert sum_of(3, 4).key({"left": "a", "right": "b"}) == key  # equal bytes, whatever made them
    assert Number(value=1, comment="x").key({}) == Number(value=1).key({})


def test_changes_name_the_field():
    old, new = canonical(Recipe()), canonical(Recipe(inner=Inner(width=8), later="now"))
    assert changes(old, new) == ["inner.width: 4 -> 8", "later: unset -> now"]


def test_a_mutable_default_is_not_shared():
    @dataclass(frozen=True)
    class WithKnob:
        items: dict = knob(default_factory=dict)
        other: list = field(default_factory=list)

    assert WithKnob().items is not WithKnob().items


@dataclass(frozen=True)
class Changed:
    lr: float = 0.1
    later: str = added("better", birth="as before")


def test_a_later_field_whose_default_has_changed_keeps_the_keys_of_what_names_a_value():
    assert canonical(Changed(later="as before")) == {"lr": 0.1}
    assert canonical(Changed()) == canonical(Changed(later="better")) == {"lr": 0.1, "later": "better"}


@dataclass(frozen=True)
class Ranked:
    method: str = "full"
    rank: int = added(8, birth=4, where={"method": "low rank"})


def test_a_later_field_counts_only_where_it_is_read():
    assert canonical(Ranked()) == canonical(Ranked(rank=16)) == {"method": "full"}
    assert canonical(Ranked(method="low rank")) == {"method": "low rank", "rank": 8}
    assert canonical(Ranked(method="low rank", rank=4)) == {"method": "low rank"}
