"""Requests made up from the OpenAPI document: never a 5xx by a defect, never a leak, nothing that the document does not say.

`make test` sends a thousand; `FUZZ=10 make test PYTEST_ARGS=tests/api/test_fuzz.py` ten times as many, in some minutes.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.config.args import RouterArgs
from deployments.dispatch.dispatcher import Dispatcher
from deployments.dispatch.routing import Routing
from deployments.fleet.watch import Fleet
from deployments.ingress.acestep.fields import FIELDS
from deployments.ingress.app import build_app
from deployments.ingress.service import Service
from deployments.jobs.blobs import Storage
from deployments.jobs.store import JobStore

from .conftest import fleet_view

# The described fleet has no replicas, so what asks them answers 503; that is an answer, not a defect.
NO_REPLICA = 503
# Status, content type, headers and body of every answer are those of the document.
DOCUMENTED = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
TIMES = int(os.environ.get("FUZZ", "1"))
LEAKS = ("Traceback", 'File "', "site-packages", "sqlite3", "psycopg")


class Server:
    """The application on its own thread behind a real HTTP server."""

    def __init__(self, home: Path) -> None:
        args = RouterArgs(max_queue=10_000_000, chat_timeout_s=0.01, max_wait_s=0.01)
        store, fleet, routing = JobStore(f"sqlite:///{home / 'jobs.sqlite3'}"), Fleet(), Routing()
        fleet.view = fleet_view(pools=tuple(_idle(p) for p in fleet_view().pools))
        dispatcher = Dispatcher(store, fleet, routing, lease_s=15)
        self.service = Service(args, store, Storage(str(home / "files")), fleet, routing, dispatcher)
        self.home = str(home)
        config = uvicorn.Config(build_app(self.service), port=0, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive(), "the server did not start"
        self.url = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def check(self, answer: Any) -> None:
        text = answer.text if not callable(answer.text) else answer.text()
        assert answer.status_code < 500 or answer.status_code in (NO_REPLICA, 504), (answer.status_code, text[:2000])
        assert not any(leak in text for leak in LEAKS), text[:2000]
        assert self.home not in text or answer.status_code == 200, text[:2000]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self.service.store.close()


def _idle(pool: Any) -> Any:
    return type(pool)(**{**{f: getattr(pool, f) for f in pool.__dataclass_fields__}, "running": 0})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("fuzz")
        patch.setenv("ACESTEP_HOME", str(home))
        patch.delenv("ACESTEP_API_KEY", raising=False)
        running = Server(home)
        yield running
        running.stop()


def _settings(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )  # fmt: skip


def _walk(server: Server, examples: int) -> int:
    """Send `examples` requests for each operation of the document. Returns how many were sent."""
    schema = schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json", timeout=60).json())
    sent = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        # Valid by the document, and not. Some operations leave nothing to get wrong.
        kinds = [operation.as_strategy(mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]

        @given(case=st.one_of(*kinds))
        @_settings(examples)
        def send(case: Any) -> None:
            nonlocal sent
            sent += 1
            answer = case.call(base_url=server.url, timeout=20)
            server.check(answer)
            case.validate_response(answer, checks=DOCUMENTED)

        send()
    return sent


@pytest.mark.timeout(600 * TIMES)
def test_the_document_is_complete_and_walked(server: Server) -> None:
    assert _walk(server, 8 * TIMES) >= 200 * TIMES


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ({"204": {"description": "Nothing"}}, "Undocumented status code"),
        ({"200": {"description": "x", "content": {"text/csv": {}}}}, "(?i)content.type"),
        (
            {"200": {"description": "x", "content": {"application/json": {"schema": {"required": ["x"]}}}}},
            "(?i)schema",
        ),
    ],
    ids=["status", "type", "body"],
)
def test_what_the_document_does_not_say_is_noticed(server: Server, said: dict[str, Any], wrong: str) -> None:
    document = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    document["paths"]["/livez"]["get"]["responses"] = said
    case = schemathesis.openapi.from_dict(document)["/livez"]["GET"].Case()
    answer = case.call(base_url=server.url)
    with pytest.raises(BaseException, match=wrong):  # pytest's own, of several failures
        case.validate_response(answer, checks=DOCUMENTED)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40)
    | st.sampled_from(["8.0", "-1", "1e999", "NaN", "true", "/etc/passwd", "../x", "[verse]", "a\x00b", "\ud800", "0,1,2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
NAMES = st.sampled_from(
    [n for f in FIELDS.values() for n in (f.name, *f.aliases)] + ["param_obj", "metas", "ai_token", "task_id_list"]
)
PATHS = (
    "/release_task",
    "/query_result",
    "/format_input",
    "/create_random_sample",
    "/v1/create_sample",
    "/v1/cancel",
    "/v1/init",
)


def _nonsense(server: Server, examples: int) -> int:
    """Fields of ACE-Step's API with values of every kind, in every encoding. Returns how many were sent."""
    sent = 0
    client = httpx.Client(base_url=server.url, timeout=20)

    @given(
        path=st.sampled_from(PATHS),
        fields=st.dictionaries(NAMES, VALUES, max_size=6),
        encoding=st.sampled_from(["json", "form", "multipart", "none", "raw"]),
        raw=st.binary(max_size=60),
    )
    @_settings(examples)
    def send(path: str, fields: dict[str, Any], encoding: str, raw: bytes) -> None:
        nonlocal sent
        sent += 1
        body = json.dumps(fields).encode()
        text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in fields.items()}
        text = {k: v.encode("utf-8", "replace").decode() for k, v in text.items()}
        if encoding == "json":
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
        elif encoding == "form":
            answer = client.post(path, data=text)
        elif encoding == "multipart":
            answer = client.post(path, files={k: (None, v) for k, v in text.items()} or {"x": (None, "")})
        else:
            answer = client.post(path, content=body if encoding == "none" else raw)
        server.check(answer)

    send()
    client.close()
    return sent


@pytest.mark.timeout(600 * TIMES)
def test_nonsense_in_every_encoding(server: Server) -> None:
    assert _nonsense(server, 600 * TIMES) == 600 * TIMES
