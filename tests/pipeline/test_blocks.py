"""The texts of blocks of lines are those of the rows; so are the errors."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import blocks, readers
from pipeline.blocks import read_texts
from pipeline.errors import DataError
from pipeline.readers import Reading, read_rows, text_of
from pipeline.sources import Source, find

BOM = b"\xef\xbb\xbf"
JSON_LINES = [
    b'{"text": "a plain one"}',
    b'{"text": "caf\\u00e9 \\ud83d\\ude00", "label": [1, {"text": "inner"}]}',
    b'{"text": null}',
    b'{"text": ""}',
    b'  {"text": "spaces around"} \r',
    b'{"text": "nul \\u0000"}',
    b'{"text": "twice", "text": "the last"}',
]
ODD_JSON_LINES = [
    b"",
    b"  ",
    b'{"text": 5}',
    b'{"other": "x"}',
    b'["text"]',
    b'"text"',
    b'{"text": "a',
    b'{"text": "bad \xff"}',
    b'{"text": "\\ud800"}',
    b'{"text": "raw nul \x00"}',
    BOM + b'{"text": "marked"}',
    b'{"text": "long ' + b"x" * 300 + b'"}',
]
PLAIN_LINES = [b"", b"one", b"two words", "日本".encode(), b"cr\r", b"\rinside\r it\r\r", BOM, b"y" * 150 + b" z" * 40]
ODD_PLAIN_LINES = [b"\xff", b"nul \x00", b"w " * 300, b"v" * 500]


def content(usual: list[bytes], odd: list[bytes]) -> st.SearchStrategy[bytes]:
    """Lines of which few are odd, with or without a BOM and a last line end."""
    line = st.sampled_from(usual * 6 + odd)
    return st.tuples(st.sampled_from([b"", BOM]), st.lists(line, max_size=25), st.sampled_from([b"", b"\n"])).map(
        lambda parts: parts[0] + b"\n".join(parts[1]) + parts[2]
    )


def outcome(source: Source, how: Reading, *, in_blocks: bool) -> tuple[list[str], str, dict[str, int]]:
    """The texts, or the error in their place, and what was counted."""
    found: list[str] = []
    try:
        if in_blocks:
            found = [text for texts in read_texts(source, "text", how) for text in texts]
        else:
            found = [text_of(row, source, "text") for row in read_rows(source, ["text"], how)]
    except DataError as error:
        return [], str(error), {}
    return found, "", dict(+how.counts)


@pytest.mark.parametrize(
    ("name", "usual", "odd"), [("a.jsonl", JSON_LINES, ODD_JSON_LINES), ("a.txt", PLAIN_LINES, ODD_PLAIN_LINES)]
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), repair=st.booleans(), whole_files=st.booleans(), block=st.integers(1, 400))
def test_blocks_say_what_rows_say(tmp_path: Path, monkeypatch, name, usual, odd, data, repair, whole_files, block):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(readers, "MAX_PIECE_BYTES", 200)
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 250)
    path = tmp_path / name
    path.write_bytes(data.draw(content(usual, odd)))
    [source] = find(str(path))
    by_rows, by_blocks = (
        outcome(source, Reading(repair=repair, whole_files=whole_files, counts=Counter()), in_blocks=in_blocks)
        for in_blocks in (False, True)
    )
    assert by_blocks == by_rows
