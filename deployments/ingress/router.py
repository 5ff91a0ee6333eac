"""The ingress deployment: HTTP in front, the dispatcher behind, both in one event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from deployments.config.args import RouterArgs, parse_args
from deployments.dispatch.calls import Calls
from deployments.dispatch.dispatcher import Dispatcher
from deployments.dispatch.routing import Routing
from deployments.fleet.listening import NO_KEY, NO_TOKEN, close_rays_own_token, is_loopback, listeners, token_needed
from deployments.fleet.watch import Fleet
from deployments.ingress.app import build_app
from deployments.ingress.native.health import readiness
from deployments.ingress.service import Service
from deployments.jobs import retry
from deployments.jobs.blobs import Storage
from deployments.jobs.schema import ACTIVE
from deployments.jobs.store import UNREACHABLE, JobStore
from deployments.jobs.threads import store_pool
from deployments.jobs.waiting import read_backlogs
from deployments.telemetry.logs import join_serve

log = logging.getLogger(__name__)
BACKLOG_POLL_S = 1.0
ENDED_POLL_S = 15.0  # how many jobs have ended is no news every second, and takes longer with each of them
LAST_LOOK_S = 4.0


class Router:
    """Composes the pools through their handles. Touches no model and no device."""

    async def start(self, args: dict[str, Any]) -> None:
        """Open the job store and begin to look after its jobs."""
        join_serve()
        asyncio.get_running_loop().set_default_executor(store_pool())
        parsed = parse_args(RouterArgs, args, "router")
        # Where everything starts again after a power cut, the database may come last; a router that gives up too soon is not started again.
        store = await asyncio.to_thread(
            retry.patiently, retry.START, "the job store", lambda: JobStore(parsed.database_url), UNREACHABLE
        )
        storage = Storage(parsed.files_url)
        here = serve.get_replica_context()
        fleet = Fleet((here.app_name, here.replica_id.unique_id))
        routing = Routing()
        # Serve's gRPC writes an address of IPv6 as if it were one of IPv4.
        calls = Calls(by_grpc=parsed.stage_calls == "grpc" and ":" not in _own_address())
        dispatcher = Dispatcher(
            store, fleet, routing, lease_s=parsed.lease_s, max_run_s=parsed.max_run_s, calls=calls,
            cluster=ray.get_runtime_context().get_session_name(),
        )  # fmt: skip
        self.service = Service(parsed, store, storage, fleet, routing, dispatcher)
        loops = (
            fleet.run(), dispatcher.run(), self.service.outbox.run(), self.service.retention.run(),
            self._watch_backlogs(), self._tell_when_ready(),
        )  # fmt: skip
        self._background = [asyncio.create_task(loop) for loop in loops]

    def build_app(self) -> FastAPI:
        return build_app(self.service)

    async def _watch_backlogs(self) -> None:
        """What waits for each pool, all routers together, for placement and arrival times."""
        service, counted = self.service, -math.inf
        while True:
            try:
                backlogs = await asyncio.to_thread(read_backlogs, service.store.url)
                service.routing.backlogs = backlogs
                states = await asyncio.to_thread(service.store.counts, ACTIVE)
                if time.monotonic() - counted > ENDED_POLL_S:
                    states, counted = await asyncio.to_thread(service.store.counts), time.monotonic()
                service.dispatcher.meter.fleet(
                    service.fleet.view.pools, backlogs, states, service.routing.corrections.factor
                )
            except Exception:
                log.exception("cannot read what waits")
            await asyncio.sleep(BACKLOG_POLL_S)

    async def _tell_when_ready(self) -> None:
        close_rays_own_token()
        while self.service.fleet.view.http_host is None:
            await self.service.fleet.changed.wait()
        view = self.service.fleet.view
        for line in listeners(f"{view.http_host}:{view.http_port}", self.service.keys.required):
            log.info("listens: %s", line)
        if not token_needed():
            log.warning(NO_TOKEN)
        if not is_loopback(view.http_host) and not self.service.keys.required:
            log.warning(NO_KEY, view.http_host)
        while not (told := readiness(self.service.fleet.view))[0]:
            await self.service.fleet.changed.wait()
        pools = ", ".join(f"{p['role']} on {p['pool']}" for p in told[1]["pools"] if p["running"])
        notices = {str(p.info["notice"]) for p in self.service.fleet.view.pools if p.info and p.info.get("notice")}
        log.info("ready to make songs: %s%s", pools, f" ({'; '.join(notices)})" if notices else "")
        log.info("Application startup complete")  # what some clients of ACE-Step's own server wait for in the log

    def check_health(self) -> None:
        self.service.dispatcher.check()
        for task in self._background:
            if task.done() and not task.cancelled() and task.exception() is None:
                continue
            if task.done() and not task.cancelled():
                raise RuntimeError(f"a background task of the router ended: {task.exception()!r}")

    async def close(self) -> None:
        """Let the stages that run here end, hand back what does not, and stop."""
        if service := getattr(self, "service", None):
            try:
                # Is it this router that leaves, or all of Serve?
                await asyncio.wait_for(service.fleet.refresh(), LAST_LOOK_S)
                await service.dispatcher.finish(service.args.graceful_shutdown_s)
            except Exception:
                log.info("could not look at the fleet before leaving", exc_info=True)
        for task in getattr(self, "_background", []):
            task.cancel()
        await asyncio.gather(*getattr(self, "_background", []), return_exceptions=True)
        if service := getattr(self, "service", None):
            try:
                await asyncio.wait_for(service.fleet.last_look(), LAST_LOOK_S)
            except Exception:
                log.info("could not look at the fleet a last time", exc_info=True)
            service.store.close()


def _own_address() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address
