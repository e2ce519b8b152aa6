"""What can be wrong with a store that machines share, and what a user is told."""

import os
import subprocess
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from pipeline import filesystems, publish, remote
from pipeline.errors import EnvironmentProblem, UsageError
from pipeline.store import Store
from tests.pipeline.shared_stores import BUCKET, make


@pytest.mark.parametrize(
    "url", ["s3://AKIA:p/ssw0rd@bucket/x", "s3://ssw0rd@x", "ftp://me:p/ssw0rd@h", "me:p/ssw0rd@h"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(tmp_path: Path, url: str):
    with pytest.raises(UsageError, match="credentials") as error:
        Store(tmp_path, url)
    assert "ssw0rd" not in str(error.value)
    assert "AKIA" not in str(error.value)


@pytest.mark.parametrize("url", ["ftp://host/x", "/folder", "file://folder", "s3://", "file:///", "memory://"])
def test_what_is_no_url_of_a_store_is_refused(tmp_path: Path, url: str):
    with pytest.raises(UsageError):
        Store(tmp_path, url)


def test_a_missing_bucket_is_told_apart_from_a_missing_file(tmp_path: Path, s3: str):
    store = Store(tmp_path, "s3://no-such-bucket/x")
    for use in (lambda: store.find("toy", "k"), lambda: remote.push(make(tmp_path / "a"), "s3://no-such-bucket/x")):
        with pytest.raises(EnvironmentProblem, match="no bucket 'no-such-bucket'") as error:
            use()
        assert error.value.exit_code == 3
    assert Store(tmp_path, f"s3://{BUCKET}/x").find("toy", "k") is None


def told(s3_setting: dict[str, str | None], bucket: str) -> str:
    """What the first use of a bucket says under other settings."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_setting.items():
            patch.delenv(name) if value is None else patch.setenv(name, value)
        filesystems.connected.cache_clear()
        try:
            with pytest.raises(EnvironmentProblem) as error:
                remote.manifest(f"s3://{bucket}/x")
        finally:
            filesystems.connected.cache_clear()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_endpoint_that_does_not_answer_is_told_at_once(s3: str):
    start = time.monotonic()
    message = told({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "unreachable-bucket")
    assert time.monotonic() - start < 10
    for part in ("s3://unreachable-bucket/x", "no answer", "127.0.0.1:9", "AWS_ENDPOINT_URL"):
        assert part in message


def test_missing_credentials_are_told(s3: str):
    message = told({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "private-bucket")
    for part in ("s3://private-bucket/x", "no credentials", "AWS_ACCESS_KEY_ID"):
        assert part in message


def test_a_missing_package_is_told_with_the_command_that_installs_it():
    code = """
import sys
sys.modules["s3fs"] = None
from pipeline import remote
from pipeline.errors import EnvironmentProblem
try:
    remote.manifest("s3://bucket/x")
except EnvironmentProblem as problem:
    print(problem)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True, check=False
    )
    assert "s3://bucket/x" in done.stdout
    assert "pip install 'gristmill[s3]'" in done.stdout


def test_a_store_that_is_away_for_a_moment_is_waited_for(tmp_path: Path, s3: str):
    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        filesystems.connected.cache_clear()
        remote.push(make(tmp_path / "a"), f"s3://{BUCKET}/away")
        server.stop()
        again = ThreadedMotoServer(host, port, verbose=False)
        back = threading.Timer(1, again.start)
        back.start()
        found = remote.manifest(f"s3://{BUCKET}/away")
        back.join()
        again.stop()
    filesystems.connected.cache_clear()
    assert found == publish.verify(tmp_path / "a")


def test_only_a_store_that_has_answered_is_asked_again_and_only_where_that_may_help():
    place = replace(filesystems.place("memory://x"), scheme="s3", path=f"{uuid.uuid4().hex}/x")
    asked: list[int] = []

    def fails(error: Exception | None, *, times: int) -> str:
        asked.append(0)
        if error and len(asked) <= times:
            raise error
        return "answer"

    def tries(error: Exception | None, times: int) -> int:
        asked.clear()
        with suppress(EnvironmentProblem):
            filesystems.ask(place, lambda: fails(error, times=times), waits=(0.01, 0.01, 0.01))
        return len(asked)

    assert tries(ConnectionError("reset"), 1) == 1
    assert tries(None, 0) == 1
    assert tries(ConnectionError("reset"), 2) == 3
    assert tries(ConnectionError("reset"), 99) == 4
    assert tries(PermissionError("no"), 99) == 1
