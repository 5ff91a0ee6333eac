"""Webhooks: sent from the outbox that a job's end writes, signed after the Standard Webhooks scheme, retried, never into private networks.

A message is claimed by moving its next attempt into the future, so several routers share the work and one that dies loses nothing. After
the last pause a message is a dead letter: visible, and sent again on request.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import httpx
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.engine import Engine

from acestep.errors import InvalidRequest
from deployments.jobs.database import storable, writer
from deployments.jobs.schema import webhooks
from deployments.jobs.threads import with_names

log = logging.getLogger(__name__)

PENDING, DELIVERED, DEAD = "pending", "delivered", "dead"
POLL_S = 1.0
AT_ONCE = 64  # requests of one router: receivers that hang hold up the others no sooner
SPARE_S = 30.0  # what a claim lasts beyond the request's own limit
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Only what IANA has given out for the internet is public, whatever Python's own tables know: everything else of IPv6 is local or is IPv4
# in disguise. https://www.iana.org/assignments/ipv6-unicast-address-assignments, .../iana-ipv6-special-registry, ...ipv4-special-registry
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
_NOT_GLOBAL = tuple(
    ipaddress.ip_network(n)
    for n in (
        "2001:db8::/32",
        "2001:2::/48",
        "2001:10::/28",
        "2001:20::/28",
        "3fff::/20",
        "192.0.0.0/24",
        "192.88.99.0/24",
    )
)


@dataclass(frozen=True)
class Message:
    """One row of the outbox."""

    id: str
    job_id: str
    owner_key: str
    url: str
    type: str
    state: str
    attempts: int
    next_at: float | None
    last_status: int | None
    last_error: str | None
    created_at: float
    delivered_at: float | None


class JobEndedData(BaseModel):
    """Which job ended, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    job_id: str = Field(description="The job.", examples=["3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52"])
    state: Literal["succeeded", "failed", "cancelled"] = Field(description="How it ended.", examples=["succeeded"])
    url: str = Field(
        description="The job's view: a path of this server, or a URL where it has a `public_url`. Needs the key.",
        examples=["/v1/jobs/3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52"],
    )


class JobEnded(BaseModel):
    """What a webhook is sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["job.succeeded", "job.failed", "job.cancelled"] = Field(
        description="What happened.", examples=["job.succeeded"]
    )
    timestamp: datetime = Field(description="When it happened, in UTC.", examples=["2026-01-31T12:00:00Z"])
    data: JobEndedData = Field(description="To what.")


class Refused(Exception):
    """The address may not be reached; the text is fit for the owner of the webhook."""


# -- where a webhook may go


def check_url(url: str, networks: Sequence[str]) -> None:
    """Refuse at submit what can be seen to be wrong. Names are resolved, and checked again, when a message is sent.

    Raises:
        InvalidRequest: not an http(s) URL, with credentials in it, or to an address that is not public.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InvalidRequest("webhook_url: is not a URL", field="webhook_url") from None
    if parts.scheme not in ("http", "https") or not host or not url.isascii() or not url.isprintable():
        raise InvalidRequest("webhook_url: must be an http or https URL", field="webhook_url")
    if parts.username is not None or parts.password is not None:
        raise InvalidRequest("webhook_url: must not hold a user name or password", field="webhook_url")
    address = _written(host)
    if "%" in host or (address is not None and not allowed(address, networks)):  # zones are of this machine alone
        raise InvalidRequest("webhook_url: private addresses are not allowed", field="webhook_url")


def _written(host: str) -> Address | None:
    """The address that a host is, in any way of writing one (`127.1`, `0x7f.1` and `2130706433` are 127.0.0.1); None for a name to look up."""
    host = host.rstrip(".").lower()
    if host == "localhost" or host.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def allowed(address: Address, networks: Sequence[str]) -> bool:
    """Whether a message may be sent to this address: public ones, and those of the configured networks."""
    for inner in _meant(address):
        listed = any(inner in ipaddress.ip_network(n, strict=False) for n in networks)
        if not listed and not _public(inner):
            return False
    return True


def _public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (address not in _GLOBAL_V6 or address.scope_id is not None):
        return False
    return address.is_global and not address.is_multicast and not any(address in n for n in _NOT_GLOBAL)


def _meant(address: Address) -> list[Address]:
    """The address and any IPv4 address that travels inside it."""
    found: list[Address] = []
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return [address.ipv4_mapped]
        if address.sixtofour is not None:
            found.append(address.sixtofour)
        if address.teredo is not None:
            found.extend(address.teredo)
        if address in _NAT64:
            return [ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)]
    return [address, *found]


async def resolve(host: str, port: int, networks: Sequence[str]) -> str:
    """One allowed address of a host, to connect to as it is: a second look-up could answer otherwise.

    Raises:
        Refused: it has none, or one that is not allowed.
    """
    try:
        found = await with_names(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # the second: no name at all, such as one with a label of 64 characters
        raise Refused("the host name cannot be resolved") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(allowed(ipaddress.ip_address(a), networks) for a in addresses):
        raise Refused("the host's address is private")
    return addresses[0].partition("%")[0]


# -- signing


def sign(secret: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The `webhook-signature` header: `v1,` and base64 of HMAC-SHA256 over `id.timestamp.body`."""
    digest = hmac.new(secret, f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def shown_secret(secret: bytes) -> str:
    """The secret as receivers configure it: `whsec_` and base64."""
    return f"whsec_{base64.b64encode(secret).decode()}"


def derived_secret(secret: bytes, owner: str) -> bytes:
    """Each owner's own secret, so that one receiver cannot sign for another."""
    return hmac.new(secret, f"webhook:{owner}".encode(), hashlib.sha256).digest()


# -- the outbox


class Outbox:
    """Sends what waits.

    Args:
        engine: The job store's.
        secret: What the owners' secrets derive from.
        retry_s: Pauses between attempts; one more attempt than pauses.
        networks: Private networks that may be reached.
        timeout_s: For one attempt.
        public_url: What stands in front of the paths of jobs.
    """

    def __init__(
        self, engine: Engine, secret: bytes, *, retry_s: Sequence[float], networks: Sequence[str], timeout_s: float,
        public_url: str | None = None,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._writer = writer(engine)
        self._secret = secret
        self.retry_s = tuple(retry_s)
        self.networks = tuple(networks)
        self.timeout_s = timeout_s
        self.public_url = (public_url or "").rstrip("/")

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Made once, and only where it is needed: reading the authorities takes a while (SSL_CERT_FILE names others)."""
        return httpx.create_ssl_context()

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as sending:
            busy: set[asyncio.Task[None]] = set()
            while True:
                try:
                    due = await asyncio.to_thread(self.claim, AT_ONCE - len(busy))
                except Exception:
                    log.exception("webhooks cannot be sent now; trying again")
                    due = []
                for message in due:
                    task = sending.create_task(self._send(message))
                    busy.add(task)
                    task.add_done_callback(busy.discard)
                await asyncio.sleep(0.0 if due and len(busy) < AT_ONCE else POLL_S)

    def claim(self, limit: int = AT_ONCE) -> list[Message]:
        """At most `limit` messages whose turn has come, reserved for this router."""
        now = time.time()
        due = (
            sa.select(webhooks.c.id)
            .where(webhooks.c.state == PENDING, webhooks.c.next_at <= now)
            .order_by(webhooks.c.next_at)
            .limit(limit)
        )
        with self._engine.connect() as db:  # mostly there are none, and the write lock is not needed
            if db.execute(due).first() is None:
                return []
        with self._writer.begin() as db:
            ids = list(db.execute(due.with_for_update(skip_locked=True)).scalars())
            taken = (
                webhooks.update()
                .where(webhooks.c.id.in_(ids))
                .values(next_at=now + self.timeout_s + SPARE_S, attempts=webhooks.c.attempts + 1)
                .returning(webhooks)
            )
            return [Message(**row) for row in db.execute(taken).mappings()] if ids else []

    def page(self, *, owner_key: str | None, state: str | None, limit: int) -> list[Message]:
        """Newest first."""
        query = sa.select(webhooks).order_by(webhooks.c.created_at.desc()).limit(limit)
        if owner_key is not None:
            query = query.where(webhooks.c.owner_key == owner_key)
        if state is not None:
            query = query.where(webhooks.c.state == state)
        with self._engine.connect() as db:
            return [Message(**row) for row in db.execute(query).mappings()]

    def retry(self, message_id: str, owner_key: str | None) -> Message | None:
        """Send a dead letter (or a waiting message) at once, with all its attempts again. None where there is no such message."""
        if not storable(message_id):
            return None
        wanted = webhooks.c.id == message_id
        if owner_key is not None:
            wanted = sa.and_(wanted, webhooks.c.owner_key == owner_key)
        with self._writer.begin() as db:
            db.execute(
                webhooks.update()
                .where(wanted, webhooks.c.state != DELIVERED)
                .values(state=PENDING, next_at=time.time(), attempts=0)
            )
            row = db.execute(sa.select(webhooks).where(wanted)).mappings().first()
        return Message(**row) if row else None

    async def _send(self, message: Message) -> None:
        try:
            status, error = await self._post(message)
            values: dict[str, Any] = {"last_status": status, "last_error": error}
            if error is None:
                values |= {"state": DELIVERED, "delivered_at": time.time(), "next_at": None}
            elif status == 410 or message.attempts > len(self.retry_s):  # 410: the receiver wants no more
                values |= {"state": DEAD, "next_at": None}
                log.warning("webhook %s of job %s is a dead letter: %s", message.id, message.job_id, error)
            else:
                values["next_at"] = time.time() + self.retry_s[message.attempts - 1]
            await asyncio.to_thread(self._record, message, values)
        except Exception:
            log.exception("what became of webhook %s is not known; it is sent again", message.id)

    def _record(self, message: Message, values: dict[str, Any]) -> None:
        with self._writer.begin() as db:
            # A retry that was asked for meanwhile has reset the attempts, and wins.
            mine = sa.and_(webhooks.c.id == message.id, webhooks.c.attempts == message.attempts)
            db.execute(webhooks.update().where(mine).values(**values))

    async def _post(self, message: Message) -> tuple[int | None, str | None]:
        """(status, what went wrong): None for the second where the receiver answered 2xx."""
        told = {
            "type": message.type,
            "timestamp": datetime.fromtimestamp(message.created_at, UTC),
            "data": {"job_id": message.job_id, "state": message.type.removeprefix("job."),
                     "url": f"{self.public_url}/v1/jobs/{message.job_id}"},
        }  # fmt: skip
        body = JobEnded.model_validate(told).model_dump_json().encode()
        now = int(time.time())
        parts = urlsplit(message.url)
        host = parts.hostname or ""
        port = parts.port or (443 if parts.scheme == "https" else 80)
        headers = {
            "Content-Type": "application/json",
            "Host": parts.netloc,
            "User-Agent": "acestep-webhooks",
            "webhook-id": message.id,
            "webhook-timestamp": str(now),
            "webhook-signature": sign(derived_secret(self._secret, message.owner_key), message.id, now, body),
        }
        # No proxy and no redirect: both would choose another address than the one that was checked.
        options: dict[str, Any] = {
            "trust_env": False, "follow_redirects": False, "timeout": self.timeout_s,
            "verify": await asyncio.to_thread(lambda: self._tls),
        }  # fmt: skip
        try:
            async with asyncio.timeout(self.timeout_s), httpx.AsyncClient(**options) as client:
                address = await resolve(host, port, self.networks)
                literal = f"[{address}]" if ":" in address else address
                target = urlunsplit((parts.scheme, f"{literal}:{port}", parts.path or "/", parts.query, ""))
                sni = {"sni_hostname": host}  # whose certificate it must be
                async with client.stream("POST", target, content=body, headers=headers, extensions=sni) as response:
                    # The body of the answer is of no interest, however long it is.
                    if response.is_success:
                        return response.status_code, None
                    return response.status_code, f"HTTP {response.status_code}"
        except Refused as refusal:
            return None, str(refusal)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            return None, type(error).__name__
