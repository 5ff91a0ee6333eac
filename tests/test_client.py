"""The reference client against a real HTTP server that comes and goes."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator

import pytest

from acestep.client import Client
from acestep.errors import InvalidRequest, Unavailable

DONE = (200, {"id": "x", "state": "succeeded"})
PROBLEM = (422, {"type": "urn:acestep:invalid_request", "detail": "duration: too long"})
NO_ROUTER = (404, "Path '/v1/jobs/x' not found.")
DIED = (500, "Internal Server Error")


class Scripted(http.server.BaseHTTPRequestHandler):
    """Gives the answers of the server's script, one after the other."""

    def do_GET(self) -> None:
        status, body = self.server.script.pop(0)  # type: ignore[attr-defined]
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Scripted) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def client_of(server: http.server.HTTPServer) -> Client:
    return Client(f"http://127.0.0.1:{server.server_port}", timeout_s=5.0)


def test_waiting_outlives_a_router_that_is_replaced(server: http.server.HTTPServer) -> None:
    server.script = [(200, {"id": "x", "state": "running"}), NO_ROUTER, DONE]  # type: ignore[attr-defined]
    with client_of(server) as client:
        assert client.wait("x", poll_s=0.01)["state"] == "succeeded"


def test_waiting_ends_where_nothing_answers_for_long(server: http.server.HTTPServer) -> None:
    server.script = [DIED, DIED]  # type: ignore[attr-defined]
    with client_of(server) as client, pytest.raises(Unavailable, match="HTTP 500"):
        client.wait("x", poll_s=0.01, patience_s=0.5)


def test_a_refusal_is_not_asked_again(server: http.server.HTTPServer) -> None:
    server.script = [PROBLEM]  # type: ignore[attr-defined]
    with client_of(server) as client, pytest.raises(InvalidRequest, match="duration: too long"):
        client.wait("x")


PROXIES = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY")


@pytest.mark.parametrize("name", [name for upper in PROXIES for name in (upper, upper.lower())])
@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:9", "socks5://127.0.0.1:9", "http://127.0.0.1:9", "nonsense"])
def test_a_server_on_this_machine_is_asked_without_the_shell_s_proxy(
    server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch, name: str, proxy: str
) -> None:
    monkeypatch.setenv(name, proxy)
    for host in ("127.0.0.1", "localhost"):
        server.script = [DONE]  # type: ignore[attr-defined]
        with Client(f"http://{host}:{server.server_port}", timeout_s=5.0) as client:
            assert client.job("x")["state"] == "succeeded"


def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:9")
    with pytest.raises(InvalidRequest, match="ALL_PROXY") as caught:
        Client("http://music.example:8000")
    assert "\n" not in caught.value.message
