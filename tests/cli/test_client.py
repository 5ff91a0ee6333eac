"""The reference client against a real HTTP server that comes and goes."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from acestep.cli.client import Client
from acestep.errors import InvalidRequest, Unavailable

DONE = (200, {"id": "x", "state": "succeeded"})
PROBLEM = (422, {"type": "urn:acestep:invalid_request", "detail": "duration: too long"})
NO_ROUTER = (404, "Path '/v1/jobs/x' not found.")
DIED = (500, "Internal Server Error")
AWAY = (503, {"type": "urn:acestep:unavailable", "detail": "the job store"}, ("Retry-After", "1"))


class Scripted(http.server.BaseHTTPRequestHandler):
    """Gives the answers of the server's script, one after the other."""

    def do_GET(self) -> None:
        status, body, *headers = self.server.script.pop(0)  # type: ignore[attr-defined]
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.headers.get("Idempotency-Key"), sent))  # type: ignore[attr-defined]
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_DELETE = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Scripted) as running:
        running.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def client_of(server: http.server.HTTPServer, patience_s: float = 60.0) -> Client:
    return Client(f"http://127.0.0.1:{server.server_port}", timeout_s=5.0, patience_s=patience_s)


def test_waiting_outlives_a_router_that_is_replaced(server: http.server.HTTPServer) -> None:
    server.script = [(200, {"id": "x", "state": "running"}), NO_ROUTER, DONE]  # type: ignore[attr-defined]
    with client_of(server) as client:
        assert client.wait("x", poll_s=0.01)["state"] == "succeeded"


def test_waiting_ends_where_nothing_answers_for_long(server: http.server.HTTPServer) -> None:
    server.script = [DIED, DIED]  # type: ignore[attr-defined]
    with client_of(server, patience_s=0.5) as client, pytest.raises(Unavailable, match="HTTP 500"):
        client.wait("x", poll_s=0.01)


RESTARTS = [NO_ROUTER, DIED, (502, "<html>"), (503, "no replica"), (504, ""), AWAY]


@pytest.mark.parametrize("answer", RESTARTS, ids=lambda a: str(a[0]))
def test_what_is_sent_while_the_router_is_replaced_is_sent_again_and_is_one_job(
    server: http.server.HTTPServer, tmp_path: Path, answer: tuple[int, Any]
) -> None:
    file = tmp_path / "song.wav"
    file.write_bytes(b"RIFF" * 1000)
    with client_of(server) as client:
        for call in (
            lambda: client.submit({"prompt": "a"}), lambda: client.cancel("x"), lambda: client.file("/a"),
            lambda: client.upload(file),
        ):  # fmt: skip
            server.seen.clear()  # type: ignore[attr-defined]
            server.script = [answer, DONE]  # type: ignore[attr-defined]
            call()
            first, second = server.seen  # type: ignore[attr-defined]
            assert first[0] == second[0]
            assert len(first[1]) == len(second[1])
        server.seen.clear()  # type: ignore[attr-defined]
        server.script = [DONE, DONE]  # type: ignore[attr-defined]
        client.submit({"prompt": "a"})
        client.submit({"prompt": "a"})
        assert len({key for key, _ in server.seen} - {None}) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("answer", [(413, "<html>too large"), (503, {"type": "urn:acestep:unavailable"})])
def test_what_no_restart_explains_is_not_sent_again(server: http.server.HTTPServer, answer: tuple[int, Any]) -> None:
    server.script = [answer]  # type: ignore[attr-defined]
    with client_of(server) as client, pytest.raises(Unavailable):
        client.submit({"prompt": "a"})


def test_a_server_that_went_away_is_waited_for_and_one_that_never_answered_is_not() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Scripted) as first:
        first.seen, first.script = [], [DONE]  # type: ignore[attr-defined]
        threading.Thread(target=first.serve_forever, daemon=True).start()
        client = client_of(first)
        client.job("x")
        first.shutdown()
    with pytest.raises(Unavailable, match="no server answers"):
        client_of(first).job("x")

    def back() -> None:
        with http.server.HTTPServer(("127.0.0.1", first.server_port), Scripted) as second:
            second.seen, second.script = [], [DONE]  # type: ignore[attr-defined]
            second.handle_request()

    coming = threading.Timer(0.5, back)
    coming.start()
    assert client.job("x")["state"] == "succeeded"
    coming.join()


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
