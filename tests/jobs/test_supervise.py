"""The supervisor with toy drivers: what it starts again, what it lets end, what it passes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.supervise import NotThere, main, variables

SUPERVISE = """
import os, sys
from jobs.supervise import Supervisor
sys.exit(Supervisor([sys.executable, "-c", sys.argv[1]], os.environ, 2, 0.02, "--tree" not in sys.argv).run())
"""
COUNT = "import os, signal, sys, time; n = open('starts', 'a').write('x') and len(open('starts').read())\n"


def supervise(code: str, folder: Path, *flags: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SUPERVISE, COUNT + code, *flags],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path.cwd()), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


def wait_for(path: Path) -> None:
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # gone before it was opened, or before it was read
        return False


@pytest.mark.parametrize("code", [0, 2, 5, 8])
def test_an_exit_code_goes_through_and_ends_it(tmp_path: Path, code: int):
    with supervise(f"sys.exit({code})", tmp_path) as process:
        assert process.wait(20) == code
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT], ids=lambda n: n.name)
def test_a_driver_that_is_killed_starts_again(tmp_path: Path, number: signal.Signals):
    with supervise(f"n < 3 and os.kill(os.getpid(), {number.value}); print('done')", tmp_path) as process:
        out, said = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "done\n")
    assert starts(tmp_path) == 3
    assert f"killed by {number.name}; starting it again in 0.04 s (2 of 2)" in said


def test_a_driver_that_keeps_dying_is_given_up(tmp_path: Path):
    with supervise("os.kill(os.getpid(), signal.SIGKILL)", tmp_path) as process:
        _, said = process.communicate(timeout=20)
    assert process.returncode == 5
    assert starts(tmp_path) == 3  # once, and twice again
    assert "3 times in a row; giving up" in said


def test_a_driver_that_somebody_ends_stays_ended(tmp_path: Path):
    with supervise("os.kill(os.getpid(), signal.SIGTERM)", tmp_path) as process:
        assert process.wait(20) == 6
    assert starts(tmp_path) == 1


# `ready` appears whole: whoever sees it may signal at once, which would end the write halfway
LAST_WORDS = """
signal.signal(signal.SIGTERM, lambda *_: (open('asked', 'a').write('x'), time.sleep(0.3), sys.exit(8)))
open('pid', 'w').write(str(os.getpid()))
os.rename('pid', 'ready')
time.sleep(60)
"""


def test_sigterm_is_passed_on_and_its_answer_waited_for(tmp_path: Path):
    with supervise(LAST_WORDS, tmp_path) as process:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 8
    assert (tmp_path / "asked").read_text() == "x"


def test_where_the_whole_tree_is_signalled_the_driver_is_told_once(tmp_path: Path):
    with supervise(LAST_WORDS, tmp_path, "--tree") as process:
        wait_for(tmp_path / "ready")
        process.send_signal(signal.SIGTERM)
        os.kill(int((tmp_path / "ready").read_text()), signal.SIGTERM)
        assert process.wait(20) == 8
    assert (tmp_path / "asked").read_text() == "x"


def test_sigterm_between_two_drivers_ends_it(tmp_path: Path):
    slow = SUPERVISE.replace("0.02", "30.0")
    command = [sys.executable, "-c", slow, COUNT + "os.kill(os.getpid(), signal.SIGKILL)"]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd())}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "starting it again" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_driver_is_asked_to_end_when_its_supervisor_is_killed(tmp_path: Path):
    with supervise(LAST_WORDS, tmp_path) as process:
        wait_for(tmp_path / "ready")
        process.kill()
        process.wait(20)
        wait_for(tmp_path / "asked")
        until = time.monotonic() + 20
        while alive(int((tmp_path / "ready").read_text())):
            assert time.monotonic() < until
            time.sleep(0.02)


def test_promised_variables_come_from_the_cluster_or_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "password").write_text("s3cret\n")
    monkeypatch.setenv("THERE", "value")
    assert variables(["THERE", f"PASSWORD=file:{tmp_path}/password"]) == {"PASSWORD": "s3cret"}
    with pytest.raises(NotThere, match="NOT_THERE is not set in the environment of the cluster"):
        variables(["NOT_THERE"])
    with pytest.raises(NotThere, match="No such file"):
        variables([f"PASSWORD=file:{tmp_path}/none"])


def test_a_missing_variable_ends_it_before_the_driver_starts(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["--home", str(tmp_path), "--env", "NOT_THERE", "--", "run", "config.yaml"]) == 3
    assert "NOT_THERE" in capfd.readouterr().err
