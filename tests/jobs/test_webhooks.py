"""Webhooks against a real receiver on this machine: signatures, retries, dead letters, and where they may not go."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import ipaddress
import json
import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
import trustme

from acestep.errors import InvalidRequest
from acestep.request import SongRequest
from deployments.jobs.outbox import Outbox, Refused, allowed, check_url, derived_secret, resolve, shown_secret
from deployments.jobs.store import JobStore

SECRET = b"s" * 32
LOCAL = ("127.0.0.0/8",)


@dataclass
class Receiver:
    """An HTTP server that answers with the next status of a list, 200 after the last."""

    statuses: list[int] = field(default_factory=list)
    seen: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?x=1"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        self.seen.append(({**headers, ":": head[0]}, body))
        status = self.statuses.pop(0) if self.statuses else 200
        location = "Location: http://127.0.0.1:1/elsewhere\r\n" if status == 302 else ""
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n{location}\r\n".encode())
        await writer.drain()
        writer.close()


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    made = Receiver()
    server = await asyncio.start_server(made.handle, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()
    await server.wait_closed()


def outbox(store: JobStore, **options: object) -> Outbox:
    defaults = {"retry_s": (0.05, 0.05), "networks": LOCAL, "timeout_s": 5.0}
    return Outbox(store.engine, SECRET, **{**defaults, **options})  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def sending(box: Outbox, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setattr("deployments.jobs.outbox.POLL_S", 0.02)
    task = asyncio.create_task(box.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def ended_job(store: JobStore, url: str) -> str:
    job_id = str(uuid.uuid4())
    store.add(job_id, SongRequest(prompt="x", seed=1), extra={"webhook": url}, owner_key="me")
    store.request_cancel(job_id)
    return job_id


async def until(box: Outbox, state: str) -> None:
    for _ in range(400):
        if [m.state for m in box.page(owner_key=None, state=None, limit=1)] == [state]:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"never {state}: {box.page(owner_key=None, state=None, limit=1)}")


async def test_delivered_once_signed_and_about_the_job(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = ended_job(store, receiver.url)
    boxes = [outbox(store), outbox(store)]  # two routers
    async with sending(boxes[0], monkeypatch), sending(boxes[1], monkeypatch):
        await until(boxes[0], "delivered")
        await asyncio.sleep(0.1)
    ((headers, body),) = receiver.seen
    assert headers[":"] == "POST /hook?x=1 HTTP/1.1"
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert list(json.loads(body)) == ["type", "timestamp", "data"]
    assert json.loads(body)["type"] == "job.cancelled"
    written = json.loads(body)["timestamp"]  # ISO 8601, as the scheme wants it
    assert written.endswith("Z")
    assert abs(datetime.fromisoformat(written).timestamp() - time.time()) < 30
    assert json.loads(body)["data"] == {"job_id": job_id, "state": "cancelled", "url": f"/v1/jobs/{job_id}"}
    # As a receiver checks it: with the secret it was shown.
    key = base64.b64decode(shown_secret(derived_secret(SECRET, "me")).removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(time.time() - int(headers["webhook-timestamp"])) < 30


async def test_retried_with_the_same_id_until_it_works(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.statuses = [500, 302]
    ended_job(store, receiver.url)
    box = outbox(store)
    async with sending(box, monkeypatch):
        await until(box, "delivered")
    assert len(receiver.seen) == 3  # the redirect was not followed
    assert len({headers["webhook-id"] for headers, _ in receiver.seen}) == 1
    (message,) = box.page(owner_key="me", state="delivered", limit=5)
    assert (message.attempts, message.last_status) == (3, 200)


async def test_a_dead_letter_is_seen_and_sent_again(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.statuses = [500, 500, 503]
    ended_job(store, receiver.url)
    box = outbox(store)
    async with sending(box, monkeypatch):
        await until(box, "dead")
        (message,) = box.page(owner_key=None, state="dead", limit=5)
        assert (message.attempts, message.last_error) == (3, "HTTP 503")
        assert box.retry(message.id, "somebody else") is None
        assert box.retry(message.id, "me") is not None
        await until(box, "delivered")


async def test_410_ends_it_at_once(store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver.statuses = [410]
    ended_job(store, receiver.url)
    box = outbox(store)
    async with sending(box, monkeypatch):
        await until(box, "dead")
    assert len(receiver.seen) == 1


async def test_a_message_of_a_router_that_died_is_sent_by_another(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended_job(store, receiver.url)
    monkeypatch.setattr("deployments.jobs.outbox.SPARE_S", 0.1)
    assert len(outbox(store, timeout_s=0.1).claim()) == 1  # claimed, and never sent
    box = outbox(store)
    async with sending(box, monkeypatch):
        await until(box, "delivered")


async def test_receivers_that_hang_hold_up_nobody(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    for _ in range(20):
        ended_job(store, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    ended_job(store, receiver.url)
    async with asyncio.timeout(30), sending(outbox(store, timeout_s=60.0), monkeypatch):
        while not receiver.seen:
            await asyncio.sleep(0.02)
    server.close()


async def test_over_tls_the_certificate_must_be_the_hosts(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    for name, state in (("localhost", "delivered"), ("other.example", "dead")):
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(name).configure_cert(tls)
        server = await asyncio.start_server(receiver.handle, "127.0.0.1", 0, ssl=tls)
        ended_job(store, f"https://localhost:{server.sockets[0].getsockname()[1]}/hook")
        box = outbox(store, retry_s=())
        async with sending(box, monkeypatch):
            await until(box, state)
        server.close()
    assert len(receiver.seen) == 1
    (message,) = box.page(owner_key=None, state="dead", limit=5)
    assert message.last_error == "ConnectError"


async def test_a_name_is_looked_up_once_so_that_it_cannot_change(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def look_up(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", receiver.port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    ended_job(store, f"http://hooks.example:{receiver.port}/hook")
    box = outbox(store)
    async with sending(box, monkeypatch):
        await until(box, "delivered")
    assert asked == ["hooks.example"]
    assert receiver.seen[0][0]["host"] == f"hooks.example:{receiver.port}"


async def test_nothing_reaches_private_networks(
    store: JobStore, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended_job(store, f"http://localhost:{receiver.port}/hook")  # a name: seen only when it is resolved
    box = outbox(store, networks=(), retry_s=())
    async with sending(box, monkeypatch):
        await until(box, "dead")
    assert receiver.seen == []
    (message,) = box.page(owner_key=None, state="dead", limit=5)
    assert message.last_error == "the host's address is private"
    for host in ("localhost", "2130706433", "127.1", "a" * 64 + ".example"):
        with pytest.raises(Refused):
            await resolve(host, 80, ())
    assert await resolve("127.0.0.1", 80, LOCAL) == "127.0.0.1"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255",
        "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::", "2002:0a00:0001::1", "fec0::1", "feff::1", "64:ff9b:1::7f00:1", "64:ff9b:1::808:808", "::ffff:0:127.0.0.1",
        "::ffff:0:8.8.8.8", "::127.0.0.1", "::8.8.8.8", "100::1", "1::1", "4000::1", "5f00::1", "3fff::1", "2001:db8::1", "2001:2::1",
        "2001:0:7f00:1::", "192.0.0.9", "192.88.99.1", "198.18.0.1", "203.0.113.1", "240.0.0.1", "2606:4700::1%lo", "::ffff:0.0.0.0",
    ],
)  # fmt: skip
def test_private_addresses_in_every_disguise(address: str) -> None:
    assert not allowed(ipaddress.ip_address(address), ())


def test_public_addresses_and_configured_networks_are_allowed() -> None:
    for address in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808"):
        assert allowed(ipaddress.ip_address(address), ())
    assert allowed(ipaddress.ip_address("10.1.2.3"), ("10.1.0.0/16",))
    assert allowed(ipaddress.ip_address("::ffff:10.1.2.3"), ("10.1.0.0/16",))
    assert not allowed(ipaddress.ip_address("10.2.2.3"), ("10.1.0.0/16",))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com", "file:///etc/passwd", "http://", "http://u:p@example.com", "https://[::1]/x", "http://127.0.0.1",
        "http://[::ffff:10.0.0.1]/", "http://2130706433/", "http://127.1/", "http://0x7f000001/", "http://0177.0.0.1/",
        "http://localhost:8080/", "http://a.localhost/", "http://localhost./", "http://LOCALHOST../", "http://127.0.0.1./", "http://127.1./",
        "http://0x7f.1/", "http://017700000001/", "http://[::ffff:7f00:1]/", "http://[fec0::1]/", "http://[::127.0.0.1]/",
        "http://[::ffff:0:127.0.0.1]/", "http://[64:ff9b:1::7f00:1]/", "http://[fe80::1%25lo]/", "http://[2606:4700::1%25lo]/",
        "http://[::1%251]/", "http://169.254.169.254./latest", "http://127\u30020.0.1/", "http://\uff11\uff12\uff17.0.0.1/",
        "http://b\xfccher.localhost/", "javascript:alert(1)", "http://exa\nmple.com", "http://example.com:99999/", "http://[bad/",
    ],
)  # fmt: skip
def test_urls_that_are_refused_at_submit(url: str) -> None:
    with pytest.raises(InvalidRequest, match="webhook_url"):
        check_url(url, ())


@pytest.mark.parametrize("host", ["localhost.", "127.1", "0x7f.1", "2130706433", "0177.0.0.1", "::1", "ip6-localhost"])
async def test_the_same_hosts_are_refused_when_a_message_is_sent(host: str) -> None:
    with pytest.raises(Refused):
        await resolve(host, 80, ())
