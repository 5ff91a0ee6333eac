"""The planner stage as a Serve deployment: a thin shell over `acestep.lm.planner`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from acestep.errors import AceStepError, Cancelled
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import Progress
from deployments.config import PlannerArgs, parse_args
from deployments.replica import ReplicaInfo, start_replica
from deployments.streaming import ProgressMailbox, failure, follow

log = logging.getLogger(__name__)


class PlannerDeployment:
    """Plans songs. One engine thread steps every song in flight; the methods here only queue and wait."""

    def __init__(self, args: dict[str, Any]) -> None:
        from acestep.lm.planner import Planner

        from acestep.checkpoints import resolve

        self.args = parse_args(PlannerArgs, args, "lm")
        start = start_replica("plan", self.args)
        checkpoint = resolve(start.model, "planner")
        began = time.monotonic()
        self.planner = Planner.load(
            checkpoint.path, start.settings.planner, name=checkpoint.name, model_hash=checkpoint.hash
        )
        self.info: ReplicaInfo = start.info(
            model=checkpoint.name, model_hash=checkpoint.hash, notice=checkpoint.notice,
            capacity=self.planner.capacity, load_s=time.monotonic() - began,
        )  # fmt: skip
        log.info("planner ready: %s", self.info)

    async def plan(
        self, request: dict[str, Any], max_duration: float, priority: float = 0.0, timeout_s: float | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """Plan a `SongRequest` whose seeds are drawn. Streams progress, then the `Plan`."""
        from acestep.lm.planner import PlanWork

        work = PlanWork(SongRequest.model_validate(request), max_duration)
        async for message in self._run(work, priority, timeout_s):
            yield message

    async def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        """understand, inspire or format: one `{"result": ...}` or `{"error": ...}`."""
        from acestep.lm.planner import FormatWork, InspireWork, UnderstandWork

        work = {"understand": UnderstandWork, "inspire": InspireWork, "format": FormatWork}[kind](**fields)
        async for message in self._run(work, priority=-1.0, timeout_s=None):
            last = message
        return last

    async def _run(self, work: Any, priority: float, timeout_s: float | None) -> AsyncIterator[dict[str, Any]]:
        mailbox = ProgressMailbox()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            ticket = self.planner.submit(work, priority=priority, deadline=deadline, on_progress=mailbox.put)
            async for item in follow(ticket, mailbox, self.planner.cancel):
                if isinstance(item, Progress):
                    yield {"progress": item.model_dump()}
                else:
                    yield {"result": item.model_dump(mode="json") if isinstance(item, Plan) else item.model_dump()}
        except asyncio.CancelledError:
            raise
        except Cancelled as error:
            yield failure(error)
        except AceStepError as error:
            yield failure(error)

    async def describe(self) -> dict[str, Any]:
        return {**self.info.to_dict(), "stats": self.planner.stats()}

    def check_health(self) -> None:
        if not self.planner.alive:
            raise RuntimeError("the planner's engine thread has ended")

    def __del__(self) -> None:
        if planner := getattr(self, "planner", None):
            planner.close()
