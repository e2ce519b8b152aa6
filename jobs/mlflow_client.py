"""The one way MLflow is reached: quiet, quick to fail, and never two processes in a database that is not there yet."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from filelock import FileLock

from jobs.record import without_password
from pipeline.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    from mlflow import MlflowClient

SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a request that is tried twice can make two runs
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is for results
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}
STORES = ("boto3", "botocore")
"""Packages by which MLflow reaches artifacts that a server leaves to its clients. Their errors are like no others."""
SQLITE = "sqlite:///"
SCHEMES = {"http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "databricks-uc", "uc"}
"""What MLflow keeps runs in; files in a folder are no longer among it."""
CLASSIC_VIEW = "workflowType=machine_learning"
"""Behind the address of a page: the one with runs and models, not the one of language model apps."""


def default_uri(home: Path) -> str:
    """Where a home keeps its own MLflow database."""
    return f"{SQLITE}{home.resolve() / 'mlflow.db'}"


def artifact_root(home: Path) -> Path:
    """Where MLflow's artifacts of this home lie, unless a server keeps them."""
    return home.resolve() / "mlartifacts"


@contextmanager
def alone(home: Path) -> Iterator[None]:
    """One process of a home writes to MLflow at a time, so that two that look for a run never both make it."""
    path = home / "locks" / "mlflow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


def check_uri(uri: str) -> None:
    """Raises UsageError for a tracking URI that MLflow has no store for."""
    scheme = uri.partition(":")[0].partition("+")[0]
    if scheme not in {*SCHEMES, *(store.name for store in entry_points(group="mlflow.tracking_store"))}:
        raise UsageError(
            f"tracking URI {without_password(uri)}: MLflow keeps no runs there. Give http://HOST:PORT of a server, "
            "sqlite:///FILE or the URL of a database"
        )


def connect(uri: str, *, create: bool = False) -> "MlflowClient":
    """A client. Imports MLflow: a second or two. A missing sqlite database is made, which takes as long, or refused.

    Hold `alone` where it may be made.
    """
    quiet()
    from mlflow import MlflowClient

    if uri.startswith(SQLITE) and not (database := Path(uri.removeprefix(SQLITE))).exists():
        if not create:
            raise UsageError(
                f"{database}: no such MLflow database, so nothing is registered there: gristmill run CONFIG does it; "
                "GRISTMILL_HOME or MLFLOW_TRACKING_URI say where"
            )
        _create(database)
    return MlflowClient(uri, registry_uri=uri)


def quiet() -> None:
    """Our settings of MLflow, where the user has not set others. Call it before MLflow is imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def _create(database: Path) -> None:
    """Created aside and renamed: a kill in mid-creation would leave a database that MLflow refuses for good."""
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    database.parent.mkdir(parents=True, exist_ok=True)
    scratch = database.with_name(f".tmp-{database.name}")
    scratch.unlink(missing_ok=True)
    engine = create_sqlalchemy_engine(f"{SQLITE}{scratch}")
    _initialize_tables(engine)
    engine.dispose()
    scratch.replace(database)


@contextmanager
def reaching(uri: str) -> Iterator[None]:
    """Raise what MLflow, its stores or the network raise in the block as one EnvironmentProblem."""
    quiet()
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise _problem(uri, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in STORES:
            raise
        raise _problem(uri, error) from error


def _problem(uri: str, error: Exception) -> EnvironmentProblem:
    from requests.exceptions import ConnectionError as NotConnected
    from requests.exceptions import Timeout

    shown = without_password(uri).rstrip("/")
    if any(isinstance(cause, ConnectionError | NotConnected | Timeout) for cause in _causes(error)):
        return EnvironmentProblem(
            f"MLflow at {shown} does not answer. Start it, or say where it is: MLFLOW_TRACKING_URI, or tracking.uri"
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0].replace(uri.rstrip("/"), shown)
    return EnvironmentProblem(f"MLflow at {shown}: {shorten(reason, 300, placeholder=' …')}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
