import errno
import os
from collections.abc import Iterator
from importlib.metadata import version

import pytest
from cyclopts import App

from jobs.cli import app
from pipeline.errors import lacking


def commands(parent: App, path: str = "gristmill") -> Iterator[tuple[str, App]]:
    for name in parent:
        if not name.startswith("-"):
            yield f"{path} {name}", parent[name]
            yield from commands(parent[name], f"{path} {name}")


@pytest.mark.parametrize("command", [pytest.param(command, id=name) for name, command in commands(app)])
def test_every_command_and_each_of_its_options_says_what_it_is_for(command: App):
    assert command.help
    arguments = command.assemble_argument_collection() if command.default_command else []
    assert [argument.names for argument in arguments if not argument.parameter.help] == []


def test_where_to_start_is_told_once(capsys: pytest.CaptureFixture[str]):
    shown = []
    for words in (["--help"], ["run", "--help"], ["config", "explain", "--help"]):
        app(words, exit_on_error=False, result_action="return_value")
        shown.append("Start here" in capsys.readouterr().out)
    assert shown == [True, False, False]


def test_a_disk_without_room_or_rights_is_no_bug_and_a_file_that_is_missing_may_be_one():
    full, missing = (OSError(code, os.strerror(code), "a/file") for code in (errno.ENOSPC, errno.ENOENT))
    assert str(lacking(full)).startswith("a/file: No space left on device.")
    assert lacking(missing) is None


def test_the_version_is_that_of_the_installed_package(capsys: pytest.CaptureFixture[str]):
    app(["--version"], exit_on_error=False, result_action="return_value")
    assert capsys.readouterr().out.strip() == version("gristmill")


@pytest.mark.parametrize(
    ("option", "value"), [("--temperature", "-1"), ("--top-k", "0"), ("--top-p", "1.5"), ("--max-new-tokens", "0")]
)
def test_a_number_that_generate_cannot_use_is_refused_in_a_line(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        app(["generate", "nothing", option, value])
    assert ended.value.code != 0
    assert option in capsys.readouterr().err
