"""The ingress deployment: HTTP in front, the dispatcher behind, both in one event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from fastapi import FastAPI

from deployments.api.app import build_app
from deployments.api.service import Service
from deployments.config import RouterArgs, parse_args
from deployments.dispatch import Dispatcher
from deployments.fleet import Fleet
from deployments.jobs.store import JobStore
from deployments.routing import Routing
from deployments.storage import Storage

log = logging.getLogger(__name__)


class Router:
    """Composes the pools through their handles. Touches no model and no device."""

    async def __init__(self, args: dict[str, Any]) -> None:
        parsed = parse_args(RouterArgs, args, "router")
        store = JobStore(parsed.database_url)
        storage = Storage(parsed.files_url)
        fleet = Fleet()
        routing = Routing()
        dispatcher = Dispatcher(store, fleet, routing, lease_s=parsed.lease_s)
        self.service = Service(parsed, store, storage, fleet, routing, dispatcher, started=time.time())
        self._background = [asyncio.create_task(fleet.run()), asyncio.create_task(dispatcher.run())]

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.service)

    def check_health(self) -> None:
        for task in self._background:
            if task.done() and not task.cancelled():
                raise RuntimeError(f"a background task of the router ended: {task.exception()!r}")

    async def __del__(self) -> None:
        for task in getattr(self, "_background", []):
            task.cancel()
        await asyncio.gather(*getattr(self, "_background", []), return_exceptions=True)
        if service := getattr(self, "service", None):
            service.store.close()
