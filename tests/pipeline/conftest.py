"""An S3 server of the tests' own, and a place in every kind of store."""

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from pipeline import filesystems
from tests.pipeline.shared_stores import BUCKET, new_url


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server with one bucket; this process and its children are set up to use it."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "toy-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "toy-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        filesystems.connected.cache_clear()
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield address
        server.stop()
    filesystems.connected.cache_clear()


@pytest.fixture(params=["file", "memory", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, s3: str) -> str:
    """A place that is still empty, in every kind of store."""
    return new_url(request.param, tmp_path)


@pytest.fixture(params=["file", "s3"])
def shared_url(request: pytest.FixtureRequest, tmp_path: Path, s3: str) -> str:
    """As `url`, where other processes see it too."""
    return new_url(request.param, tmp_path)
