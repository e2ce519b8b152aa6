"""MLflow's pages for the runs of a home: a server of one worker that answers this machine alone."""

import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs.mlflow_client import CLASSIC_VIEW, SETTINGS, alone, artifact_root, connect, reaching
from jobs.record import without_password
from pipeline.errors import EnvironmentProblem, UsageError

SETTINGS_OF_SERVER = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": SETTINGS["MLFLOW_DISABLE_TELEMETRY"],
}
STDERR = 2
STOP_SECONDS = 10.0
STARTS_WITHIN_SECONDS = 60.0


def serve_ui(home: Path, uri: str, host: str = "127.0.0.1", port: int = 5000) -> None:
    """Serve a tracking store until Ctrl-C, and print the link once it answers. For the URI of a server: only the link.

    Raises UsageError for a host that others can reach, EnvironmentProblem for a busy port.
    """
    if uri.startswith(("http://", "https://")):
        _say(f"{without_password(uri).rstrip('/')}/#/experiments?{CLASSIC_VIEW}")
        return
    if not is_loopback(host):
        raise UsageError(
            f"host={host} can be reached from outside and MLflow asks nobody for a password; use 127.0.0.1"
        )
    require_free(host, port)
    with reaching(uri), alone(home):
        connect(uri, create=True)  # makes a missing database before several threads of the server look for it
    words, surroundings = command(home, uri, host, port), environment(uri)
    server = subprocess.Popen(words, env=surroundings, stdout=STDERR, start_new_session=True)  # noqa: S603 - our own words
    threading.Thread(target=_announce, args=(host, port), daemon=True).start()
    _wait(server, host, port)


def command(home: Path, uri: str, host: str, port: int) -> Sequence[str]:
    """`mlflow server` for this store. The store's URI goes by the environment, since it may hold a password."""
    hosts = sorted({f"{name}:{port}" for name in ("localhost", "127.0.0.1", host)})
    options = {
        "--artifacts-destination": str(artifact_root(home)),
        "--host": host,
        "--port": str(port),
        "--workers": "1",
        "--allowed-hosts": ",".join(hosts),
    }
    return [sys.executable, "-m", "mlflow", "server", *(word for option in options.items() for word in option)]


def environment(uri: str) -> Mapping[str, str]:
    return {**os.environ, **SETTINGS_OF_SERVER, "MLFLOW_BACKEND_STORE_URI": uri}


def is_loopback(host: str | None) -> bool:
    """Whether only this machine can reach a server on this host."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def require_free(host: str, port: int) -> None:
    """Raise EnvironmentProblem where something else listens on the port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise EnvironmentProblem(
                f"port {port} on {host} cannot be used ({error.strerror}): something may be listening there already. "
                f"Try: gristmill ui --port {port + 1}"
            ) from error


def _announce(host: str, port: int) -> None:
    until = time.monotonic() + STARTS_WITHIN_SECONDS
    while time.monotonic() < until:
        try:
            socket.create_connection((host, port), timeout=1).close()
        except OSError:
            time.sleep(0.2)
        else:
            _say(f"http://{host}:{port}/#/experiments?{CLASSIC_VIEW}   (Ctrl-C stops it)")
            return


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _wait(server: "subprocess.Popen[bytes]", host: str, port: int) -> None:
    """Until the server ends or the user ends it; either way nothing is left running."""
    try:
        code = server.wait()
    except KeyboardInterrupt:
        return
    finally:
        stop(server)
    if code:
        raise EnvironmentProblem(f"the MLflow server on {host}:{port} ended with exit code {code}; its words are above")


def stop(server: "subprocess.Popen[bytes]") -> None:
    """End a server and its worker, with force if they take their time."""
    if server.poll() is not None:
        return
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
