"""What the production overlay writes into its Serve config is enough together with the Secrets' variables."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urlsplit

import psycopg
import pytest

from acestep.errors import Unavailable
from deployments.jobs.blobs import Storage
from deployments.jobs.store import JobStore
from deployments.k8s.check import pools, serve_config
from deployments.k8s.manifests import rayservice_of
from deployments.scheduling.autoscaling import BacklogPolicy
from tests.fleet.test_autoscaling import context, until_read
from tests.jobs.conftest import postgres  # noqa: F401 - the fixture
from tests.k8s.conftest import Document
from tests.postgres import Postgres

Rendered = Callable[[str], list[Document]]


@pytest.fixture
def router(rendered: Rendered) -> Document:
    """The router's arguments."""
    return pools(serve_config(rayservice_of(rendered("production"))))["router"].model_dump()


def test_the_job_store_is_found_by_the_variables_of_the_secret(
    router: Document, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: Postgres = request.getfixturevalue("postgres")
    url = server.database()
    monkeypatch.setenv("PGHOST", str(server.folder))
    monkeypatch.setenv("PGUSER", "acestep")
    monkeypatch.setenv("PGDATABASE", urlsplit(url).path.lstrip("/"))
    store = JobStore(router["database_url"])
    try:
        policy = BacklogPolicy(router["database_url"], "dit-tier5", poll_s=0.0)
        assert until_read(policy, context(target_num_replicas=2)) == 0  # Serve's controller finds it, too
    finally:
        store.close()
    with psycopg.connect(url) as connection:
        assert connection.execute("SELECT count(*) FROM jobs").fetchone() == (0,)


def test_the_object_store_is_found_by_the_variables_of_the_secret(
    router: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    from botocore.exceptions import EndpointConnectionError
    from botocore.session import get_session

    values = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_DEFAULT_REGION": "x",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    storage = Storage(router["files_url"])
    assert not storage.is_local
    assert get_session().get_config_variable("region") == "x"
    credentials = get_session().get_credentials()
    assert credentials is not None
    assert (credentials.access_key, credentials.secret_key) == ("key", "secret")
    # Nobody listens there: that the client tries at all shows whom it would ask.
    with pytest.raises(Unavailable) as refused:
        storage.read("song.wav")
    assert isinstance(refused.value.__cause__, EndpointConnectionError)
    assert "http://127.0.0.1:9/acestep-songs/files/song.wav" in str(refused.value.__cause__)
