"""What every API of the router works with."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any

from fastapi import Depends, Request

from acestep.checkpoints.published import VariantDefaults, expected_defaults
from acestep.errors import InvalidRequest
from deployments.config.args import RouterArgs, environment_keys
from deployments.dispatch.dispatcher import Dispatcher
from deployments.dispatch.questions import Questions
from deployments.dispatch.routing import Routing
from deployments.fleet.watch import Fleet
from deployments.ingress.auth import Caller, Keyring, RateLimit, Waiting
from deployments.ingress.forecast import Forecast
from deployments.ingress.live import LiveAudio
from deployments.ingress.middleware import made_here
from deployments.ingress.own_songs import OwnSongs
from deployments.ingress.signing import Signer
from deployments.ingress.source_audio import Admitted, Sources
from deployments.jobs.blobs import Storage
from deployments.jobs.limits import Rates
from deployments.jobs.loras import LoraDefaults
from deployments.jobs.outbox import Outbox
from deployments.jobs.retention import Retention
from deployments.jobs.secrets import shared_secret
from deployments.jobs.store import Busy, Job, JobStore
from deployments.jobs.uploads import FileRecords

QUESTIONS_AT_ONCE = 4  # of one router
MAX_QUESTIONS = 32  # of one key, waiting ones included
QUESTION_S = 5.0
DEFAULT_JOB_S = 5.0  # ACE-Step's own guess before the first song


@dataclass
class Service:
    """The router's parts, built once per replica."""

    args: RouterArgs
    store: JobStore
    storage: Storage
    fleet: Fleet
    routing: Routing
    dispatcher: Dispatcher
    keys: Keyring = field(init=False)
    rates: RateLimit = field(init=False)
    waiting: Waiting = field(init=False)
    signer: Signer = field(init=False)
    sources: Sources = field(init=False)
    talk: Questions = field(init=False)
    webhook_secret: bytes = field(init=False, repr=False)
    outbox: Outbox = field(init=False)
    retention: Retention = field(init=False)
    forecast: Forecast = field(init=False)
    loras: LoraDefaults = field(init=False)
    live: LiveAudio = field(init=False)
    _asking: Counter[str] = field(init=False, default_factory=Counter)  # questions by caller
    _turn: asyncio.Semaphore = field(init=False, default_factory=lambda: asyncio.Semaphore(QUESTIONS_AT_ONCE))

    def __post_init__(self) -> None:
        self.keys = Keyring(self.args, environment_keys())
        self.rates = RateLimit(Rates(self.store.engine))
        self.waiting = Waiting(self.args.max_waiting)
        self.signer = Signer(shared_secret(self.store.engine, "url", "ACESTEP_URL_SECRET"), self.args.url_lifetime_s)
        songs = OwnSongs(self.store, self.storage, self.signer, self.may_see)
        self.sources = Sources(self.args, self.storage, FileRecords(self.store.engine), songs)
        self.retention = Retention(
            self.store, self.storage, self.sources.records,
            keep_jobs_s=self.args.keep_jobs_s, keep_uploads_s=self.args.keep_uploads_s,
        )  # fmt: skip
        self.forecast = Forecast(self.store, self.fleet, self.routing, lambda: self.dispatcher.news)
        self.loras = LoraDefaults(self.store.engine)
        self.live = LiveAudio(self.store, self.fleet, self.dispatcher.calls, lambda: self.dispatcher.notices)
        self.talk = Questions(self.fleet, self.routing, self.dispatcher.calls)
        self.webhook_secret = shared_secret(self.store.engine, "webhook", "ACESTEP_WEBHOOK_SECRET")
        self.outbox = Outbox(
            self.store.engine, self.webhook_secret, retry_s=self.args.webhook_retry_s,
            networks=self.args.webhook_networks, timeout_s=self.args.webhook_timeout_s,
            public_url=self.args.public_url,
        )  # fmt: skip

    async def source(self, value: str, caller: Caller, field: str, *, keep: bool = True) -> Admitted:
        """The stored copy of what a request calls its source; see `Sources.admit`."""
        return await self.sources.admit(value, caller, field=field, loopback=self.loopback, keep=keep)

    @contextlib.asynccontextmanager
    async def question(self, caller: Caller) -> AsyncIterator[None]:
        """A caller's turn to ask the planner something, as long as the context lasts. Questions take few places, so that songs have the others.

        Raises:
            Busy: too many wait, or the caller has as many jobs and questions under way as it may.
        """
        most = caller.concurrent_jobs
        self._asking[caller.name] += 1
        try:
            if (mine := self._asking[caller.name]) > MAX_QUESTIONS:
                raise Busy(
                    f"{MAX_QUESTIONS} questions of this key wait already", limit=MAX_QUESTIONS, retry_after=QUESTION_S
                )
            if most is not None and mine + await asyncio.to_thread(self.store.active, caller.name) > most:
                raise Busy(
                    f"this key has as many jobs and questions under way as it may: {most}",
                    limit=most, retry_after=QUESTION_S,
                )  # fmt: skip
            async with self._turn:
                yield
        finally:
            self._asking[caller.name] -= 1
            if not self._asking[caller.name]:
                del self._asking[caller.name]

    async def job(self, job_id: str, caller: Caller | None = None) -> Job | None:
        """A job; None where there is none, or none that the caller may see."""
        job = await asyncio.to_thread(self.store.get, job_id)
        return job if job is not None and (caller is None or self.may_see(caller, job)) else None

    def may_see(self, caller: Caller, job: Job) -> bool:
        return not self.keys.required or job.owner_key == caller.name

    async def mean_seconds(self) -> float:
        """How long a song took lately."""
        return await asyncio.to_thread(self.store.mean_seconds) or DEFAULT_JOB_S

    @property
    def loopback(self) -> bool:
        """Whether the request that is being answered comes from this machine: only it can reach the server, and no proxy is between."""
        return made_here.get()


def defaults_of(info: Mapping[str, Any]) -> VariantDefaults:
    """A renderer's defaults as its replica told them; what it did not tell goes by the checkpoint's name."""
    known = {f.name for f in fields(VariantDefaults)}
    told = {name: value for name, value in (info.get("defaults") or {}).items() if name in known}
    return replace(expected_defaults(str(info["model"])), **told)


def hash_of(*parts: Any) -> str:
    """SHA-256 of JSON-able values in canonical form."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_idempotency_key(value: str | None) -> str | None:
    """The header's value.

    Raises:
        InvalidRequest: empty, too long or not printable.
    """
    if value is None:
        return None
    if not 1 <= len(value) <= 255 or not value.isascii() or not value.isprintable():
        raise InvalidRequest("Idempotency-Key: must be 1 to 255 printable ASCII characters", field="Idempotency-Key")
    return value


async def service_of(request: Request) -> Service:
    """FastAPI dependency; a coroutine, since FastAPI runs all others in threads, which downloads may hold."""
    service: Service = request.app.state.service
    return service


Svc = Annotated[Service, Depends(service_of)]
