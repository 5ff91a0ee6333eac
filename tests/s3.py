"""A real S3 endpoint on this machine (moto), for tests that store files in a bucket."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import httpx
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

BUCKET = "acestep-test"


class Endpoint:
    """A server with one bucket, which outlives it: buckets belong to the process."""

    url = f"s3://{BUCKET}/files"

    def __init__(self) -> None:
        self.port = 0
        self.open()

    def open(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()
        self.host, self.port = self._server.get_host_and_port()

    def close(self) -> None:
        self._server.stop()


@contextlib.contextmanager
def endpoint() -> Iterator[Endpoint]:
    """Points the S3 client at a server of its own with one empty bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = Endpoint()
    where = f"http://{server.host}:{server.port}"
    httpx.post(f"{where}/moto-api/reset").raise_for_status()
    values = {
        "AWS_ENDPOINT_URL_S3": where, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()
        S3FileSystem().mkdir(BUCKET)
        yield server
        S3FileSystem.clear_instance_cache()
    server.close()
