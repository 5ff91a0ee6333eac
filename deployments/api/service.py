"""What every API of the router works with."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from acestep.request import SongRequest
from deployments.config import RouterArgs
from deployments.dispatch import Dispatcher
from deployments.fleet import Fleet
from deployments.jobs.store import Job, JobStore
from deployments.routing import Routing
from deployments.storage import Storage


@dataclass
class Service:
    """The router's parts, built once per replica."""

    args: RouterArgs
    store: JobStore
    storage: Storage
    fleet: Fleet
    routing: Routing
    dispatcher: Dispatcher
    started: float

    async def submit(self, request: SongRequest, **columns: Any) -> tuple[Job, bool]:
        """Clamp to what the fleet can do, draw the seeds, write the job down, wake the dispatcher.

        Returns (job, created): False where the idempotency key was known already.
        """
        if (decision := self.routing.admit(self.fleet.view, request)) is not None:
            request = decision.request
            columns |= {
                "adjustments": decision.adjustments, "plan_pool": decision.planner, "render_pool": decision.renderer,
                "est_plan_s": decision.est_plan_s, "est_render_s": decision.est_render_s,
            }  # fmt: skip
        job, created = await asyncio.to_thread(self.store.add, str(uuid.uuid4()), request.with_seeds(), **columns)
        if created:
            self.dispatcher.wake()
        return job, created

    async def job(self, job_id: str) -> Job | None:
        return await asyncio.to_thread(self.store.get, job_id)

    @property
    def uptime_s(self) -> float:
        return time.time() - self.started


def service_of(request: Request) -> Service:
    """FastAPI dependency."""
    service: Service = request.app.state.service
    return service
