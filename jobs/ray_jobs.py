"""The Jobs API of one Ray cluster: who may speak with it, its jobs as plain values, and calls that end in time."""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs import head
from jobs.ui import is_loopback
from pipeline.errors import EnvironmentProblem, UsageError

LOCAL = "local"
AGENT_SECONDS = 60.0
"""How long a head may answer before it has an agent."""
TIMEOUT_SECONDS = (5.0, 60.0)
"""For a connection, and for an answer. Ray itself would wait for ever."""
GREETING, GREETING_SECONDS = "/api/version", (5.0, 8.0)
"""What is asked first of all."""

CONNECTIONS, PAUSE_SECONDS = 6, 0.25
"""The first connection is tried so often, with this long between."""
SILENCE_SECONDS = 3.0
"""A connection that failed after so long did not break: there was no answer."""

STATES = {"PENDING": "pending", "RUNNING": "running", "SUCCEEDED": "succeeded", "STOPPED": "cancelled"}
STATE_BY_EXIT_CODE = {6: "cancelled", 8: "preempted"}
FAILED, CANCELLED = 5, 6


class Unreachable(EnvironmentProblem):
    """A cluster that does not answer now. It may later."""


@dataclass(frozen=True)
class Target:
    """Where jobs go: `name` as a person gives it, `local` or an address."""

    name: str
    address: str
    token: str | None = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a cluster says of a job. `exit_code` is None until it has ended."""

    id: str
    state: str
    name: str
    message: str
    started_ms: int
    exit_code: int | None = None

    @property
    def ended(self) -> bool:
        return self.state not in ("pending", "running")


def target(to: str, home: Path, say: Callable[[str], None], *, start: bool = False) -> Target:
    """The cluster that `--to` means. `local` is started only if `start`; else Unreachable where none is alive."""
    if to != LOCAL:
        return remote(to, home)
    there = head.ensure(home, say) if start else head.find(home)
    if there is None:
        raise Unreachable(f"no Ray head of {home} is alive; `gristmill submit CONFIG --to local` starts one")
    return Target(LOCAL, there.address, (home / "ray-token").read_text().strip())


def remote(address: str, home: Path) -> Target:
    """A cluster at an http address. Raises UsageError, and EnvironmentProblem where a token is needed and missing."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--to {address}: give `local`, or the address of a Ray dashboard such as http://head:8265")
    if parts.username or parts.password:
        raise UsageError("--to: no user or password in the address, it is kept; set RAY_AUTH_TOKEN_PATH instead")
    token = find_token(home)
    if token is None and not is_loopback(parts.hostname):
        raise EnvironmentProblem(
            f"{address} is another machine, and there is no token for it: whoever reaches a Ray without one may run "
            f"anything on it. Set RAY_AUTH_TOKEN_PATH to the file with the cluster's token, or put it at "
            f"{home / 'ray-token'} (mode 0600); the cluster needs RAY_AUTH_MODE=token"
        )
    return Target(address.rstrip("/"), address.rstrip("/"), token)


def find_token(home: Path) -> str | None:
    """The token to show to a cluster: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, this home's, or the one Ray keeps."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            return Path(path).expanduser().read_text().strip()
        except OSError as error:
            raise EnvironmentProblem(f"RAY_AUTH_TOKEN_PATH={path}: cannot be read: {error.strerror}") from None
    kept = (home / "ray-token", Path.home() / ".ray" / "auth_token")
    return next((path.read_text().strip() for path in kept if path.is_file()), None)


class Jobs:
    """The jobs of one cluster. The first connection is made here.

    Every method raises Unreachable where the cluster does not answer, EnvironmentProblem where it refuses.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._client = self._connected()

    def _connected(self) -> Any:
        """A client that has reached the cluster. A connection that breaks is tried again; silence is not."""
        for attempt in range(CONNECTIONS):
            began = time.monotonic()
            try:
                with self._reaching():
                    return _client(self.target)
            except Unreachable:
                if attempt == CONNECTIONS - 1 or time.monotonic() - began > SILENCE_SECONDS:
                    raise
                time.sleep(PAUSE_SECONDS)
        raise AssertionError

    def submit(self, job: str, entrypoint: str, runtime_env: Mapping[str, Any], metadata: Mapping[str, str]) -> bool:
        """Submit a job under an id of ours. False where the cluster knows that id already.

        A head that has just started answers before it has an agent to give a job to; it is then asked again.
        """
        until = time.monotonic() + AGENT_SECONDS
        while True:
            with self._reaching():
                try:
                    self._client.submit_job(
                        entrypoint=entrypoint,
                        submission_id=job,
                        runtime_env=dict(runtime_env),
                        metadata=dict(metadata),
                    )
                    return True
                except RuntimeError as error:
                    if "already exists" in str(error):
                        return False
                    if "No available agent" not in str(error) or time.monotonic() > until:
                        raise

    def find(self, job: str) -> Job | None:
        """A job, or None where this cluster has none of that id."""
        with self._reaching():
            try:
                return _job(self._client.get_job_info(job))
            except RuntimeError as error:
                if _status_code(error) == 404:
                    return None
                raise

    def all(self) -> list[Job]:
        """Every job that was submitted to this cluster, by anybody, the newest first."""
        with self._reaching():
            details = self._client.list_jobs()
        jobs = [_job(one) for one in details if one.submission_id]
        return sorted(jobs, key=lambda job: -job.started_ms)

    def log(self, job: str) -> str:
        """All that a job has printed so far. Of two readings the earlier is the beginning of the later."""
        with self._reaching():
            return self._client.get_job_logs(job)

    def stop(self, job: str) -> None:
        """Ask a job to end: SIGTERM now, SIGKILL when the time it was given at submission is over."""
        with self._reaching():
            self._client.stop_job(job)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        address = self.target.address
        try:
            yield
        except AuthenticationError:
            raise EnvironmentProblem(_refused(self.target)) from None
        except OSError:  # what requests raises, and Ray's own ConnectionError
            raise Unreachable(f"{address} does not answer as a Ray head. Is it up, and is this its address?") from None
        except RuntimeError as error:
            code = _status_code(error)
            if "Version check" in str(error):
                raise EnvironmentProblem(f"{address} answers, but not as a Ray head. Is a proxy in between?") from None
            kind = Unreachable if code and code >= 500 else EnvironmentProblem
            raise kind(f"{address} could not do what was asked: {_last_line(error)}") from None


def _client(target: Target) -> Any:
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
    for variable in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        os.environ.pop(variable, None)  # Ray would let them win over the address it is given
    direct = {"proxies": {"http": None, "https": None}} if is_loopback(urlsplit(target.address).hostname) else {}

    class Client(JobSubmissionClient):
        def _do_request(self, method: str, endpoint: str, **more: Any) -> Any:
            timeout = GREETING_SECONDS if endpoint == GREETING else TIMEOUT_SECONDS
            return super()._do_request(method, endpoint, timeout=timeout, **direct, **more)

    headers = {"Authorization": f"Bearer {target.token}"} if target.token else {}
    return Client(target.address, headers=headers)


def _job(details: Any) -> Job:
    status, code = str(details.status), details.driver_exit_code
    state = STATES.get(status) or STATE_BY_EXIT_CODE.get(code, "failed")
    return Job(
        id=details.submission_id,
        state=state,
        name=(details.metadata or {}).get("name", ""),
        message=(details.message or "").splitlines()[0] if details.message else "",
        started_ms=details.start_time or 0,
        exit_code=_exit_code(status, code),
    )


def _exit_code(status: str, code: int | None) -> int | None:
    """What `logs -f` ends with. A job that was stopped, or that Ray could not run, has no code of its own."""
    match status:
        case "SUCCEEDED":
            return 0
        case "STOPPED":
            return CANCELLED
        case "FAILED":
            return FAILED if code is None else code if code >= 0 else 128 - code
        case _:
            return None


def _refused(target: Target) -> str:
    if target.token is None:
        return f"{target.address} asks for a token. Set RAY_AUTH_TOKEN_PATH to the file that has it"
    return (
        f"{target.address} refuses the token it was shown. Set RAY_AUTH_TOKEN_PATH to the file with the token of that "
        f"cluster"
    )


def _status_code(error: RuntimeError) -> int | None:
    found = re.search(r"status code (\d+)", str(error))
    return int(found[1]) if found else None


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1][:300]
