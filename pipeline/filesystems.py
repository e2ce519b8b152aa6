"""A URL as a place that can be asked: connected once, waited for a little, and its errors told in one line.

The only module that knows fsspec. The packages of s3 and gs need not be installed until such a URL is used.
"""

import errno
import functools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import fsspec

from pipeline.errors import EnvironmentProblem, UsageError

T = TypeVar("T")
log = logging.getLogger("gristmill")

CHUNK_BYTES = 8 << 20
"""A large file travels in parts of this size, 4 at once where the store allows."""
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
"""Seconds to wait, more or less, before each further try with a store that has answered before."""


@dataclass(frozen=True)
class _Scheme:
    """How one kind of store is reached. `extra` is the extra of this package that it needs."""

    extra: str = ""
    remedy: str = "Check the URL, the permissions and the room there"
    options: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, Any] = field(default_factory=dict)
    write: Mapping[str, Any] = field(default_factory=dict)


_SCHEMES = {
    "file": _Scheme(options={"auto_mkdir": True}),
    "memory": _Scheme(),
    "s3": _Scheme(
        extra="s3",
        remedy="Check the URL, AWS_ENDPOINT_URL, and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
        options={
            "use_listings_cache": False,
            "default_block_size": CHUNK_BYTES,
            "max_concurrency": 4,
            "config_kwargs": {
                "connect_timeout": 5,
                "read_timeout": 30,
                "retries": {"mode": "standard", "total_max_attempts": 3},
            },
        },
        read={"max_concurrency": 1},  # or a HEAD comes first
        write={"chunksize": CHUNK_BYTES},
    ),
    "gs": _Scheme(
        extra="gs",
        remedy="Check the URL, and GOOGLE_APPLICATION_CREDENTIALS or `gcloud auth application-default login`",
        options={"use_listings_cache": False},
        write={"chunksize": CHUNK_BYTES},
    ),
}


@dataclass(frozen=True)
class Place:
    """A URL, and the file system and path to reach it by."""

    url: str
    scheme: str
    fs: Any
    path: str

    @property
    def bucket(self) -> str:
        """Empty where the scheme has none."""
        return self.path.partition("/")[0] if self.scheme in ("s3", "gs") else ""

    @property
    def root(self) -> str:
        return f"{self.scheme}://{self.bucket}"

    @property
    def reading(self) -> Mapping[str, Any]:
        """What `cat_file` of a small file is to be called with."""
        return _SCHEMES[self.scheme].read

    @property
    def writing(self) -> Mapping[str, Any]:
        """What `put_file` is to be called with."""
        return _SCHEMES[self.scheme].write


def checked(url: str) -> str:
    """The URL of a store, without its last slash. Raises UsageError, which never repeats credentials.

    Nothing is asked of the network.
    """
    scheme, separator, rest = url.partition("://")
    host = rest.partition("/")[0] if separator else url
    if scheme != "file" and ("@" in host or ":" in host):
        shown = f"{scheme}://***" if separator else "***"
        raise UsageError(
            f"{shown}: credentials must not stand in a URL, which is stored and shown. "
            "Give s3://bucket/folder, and the credentials by the environment or a file that only you can read"
        )
    if not separator or scheme not in _SCHEMES:
        raise UsageError(
            f"{url}: not the URL of a store. Give file:///folder, s3://bucket/folder or gs://bucket/folder"
        )
    if scheme == "file" and not rest.startswith("/"):
        raise UsageError(f"{url}: a file URL has an absolute path: file:///{rest}")
    if not rest.strip("/"):
        raise UsageError(f"{url}: names no {'folder' if scheme in ('file', 'memory') else 'bucket'}")
    return url.rstrip("/")


def place(url: str) -> Place:
    """Where a URL is. Raises UsageError as `checked` does, and EnvironmentProblem where a package is missing."""
    url = checked(url)
    scheme = url.partition("://")[0]
    try:
        fs = connected(scheme, os.getpid())
    except ImportError as error:
        raise EnvironmentProblem(
            f"{url}: {scheme}:// needs a package that is not installed ({error.name or error}). "
            f"Run: pip install 'gristmill[{_SCHEMES[scheme].extra}]'"
        ) from error
    return Place(url, scheme, fs, str(fs._strip_protocol(url)))


@functools.cache
def connected(scheme: str, pid: int) -> Any:
    """The file system of a scheme: one for all threads of a process, with the credentials of its first use."""
    del pid  # part of the key, since no connection outlives a fork
    fs = fsspec.filesystem(scheme, skip_instance_cache=True, **_SCHEMES[scheme].options)
    if scheme == "s3":
        fs.retries = 1  # botocore and `ask` try again as it is; three loops inside each other would take minutes
    return fs


_answered: set[str] = set()
_buckets: set[str] = set()


def ask(where: Place, question: Callable[[], T], *, waits: Sequence[float] = WAITS) -> T:
    """Put a question to the store, again and again where that may help, if it has ever answered this process.

    FileNotFoundError is an answer; what else fails raises EnvironmentProblem.
    """
    for wait in [*(waits if where.root in _answered else ()), None]:
        try:
            answer = question()
        except (FileNotFoundError, NotADirectoryError):
            _need_bucket(where)
            _answered.add(where.root)
            raise
        except Exception as error:
            if (problem := _explained(where, error)) is None:
                raise
            if wait is None or not _is_transient(error):
                raise problem from error
            log.warning("%s Trying again in %.1f s.", problem, wait)
            time.sleep(wait * random.uniform(0.7, 1.3))  # noqa: S311 - so that a crowd does not come back at once
        else:
            _answered.add(where.root)
            return answer
    raise AssertionError("the last try answers or raises")


def _need_bucket(where: Place) -> None:
    """Tell a bucket that is not there from a file that is not."""
    if not where.bucket or where.root in _buckets:
        return
    try:
        where.fs.ls(where.bucket, detail=False)
    except FileNotFoundError as error:
        raise EnvironmentProblem(
            f"{where.url}: there is no bucket {where.bucket!r}. Create it, or correct the URL"
        ) from error
    except Exception as error:
        if _explained(where, error) is None:
            raise
        return  # who may not list the bucket may still use it
    _buckets.add(where.root)


_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "GoogleAuthError"}
_CREDENTIALS |= {"ProfileNotFound", "TokenRetrievalError", "SSOError"}
_TRANSIENT = {"ConnectionError", "TimeoutError", "HTTPClientError", "RequestException", "IncompleteRead"}
_TRANSIENT |= {"ClientConnectionError", "ClientPayloadError", "ResponseParserError"}
_TRANSIENT_ERRNO = {errno.EIO, errno.EBUSY, errno.ESTALE, getattr(errno, "EREMOTEIO", errno.EIO)}
_FOREIGN = {"botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "s3fs", "fsspec", "requests"}


def _is_transient(error: Exception) -> bool:
    """Whether the same question may be answered later. By name, since the packages need not be installed."""
    code = str(getattr(error, "code", ""))
    return bool(
        _kinds(error) & _TRANSIENT
        or (isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO)
        or code in ("408", "429")
        or code.startswith("50")
    )


def _explained(where: Place, error: Exception) -> EnvironmentProblem | None:
    """One line for what a file system or a package under it raised; None for what can only be a bug of ours."""
    module = type(error).__module__.partition(".")[0]
    if not isinstance(error, OSError | ValueError) and module not in _FOREIGN:
        return None
    text = re.sub(r"//[^/@\s]+@", "//***@", " ".join(str(error).split()))[:300]
    if _kinds(error) & _CREDENTIALS:
        what = f"no credentials ({text})"
    elif isinstance(error, PermissionError) or "Forbidden" in text or str(getattr(error, "code", "")) in ("401", "403"):
        what = f"access denied ({text}); it takes the right to list, read, write and delete"
    elif _is_transient(error):
        what = f"no answer ({type(error).__name__}: {text})"
    else:
        what = f"{type(error).__name__}: {text}"
    return EnvironmentProblem(f"{where.url}: {what}. {_SCHEMES[where.scheme].remedy}.")


def _kinds(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
