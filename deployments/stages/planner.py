"""The planner stage as a Serve deployment: a thin shell over `acestep.lm.planner`."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from acestep.errors import AceStepError, Unavailable
from acestep.request import SongRequest
from acestep.song import Progress
from deployments.config.args import PlannerArgs, parse_args
from deployments.stages.adapters import adapter_roots, with_planner_adapters
from deployments.stages.messages import ProgressMailbox, failure, follow, ticket_id
from deployments.stages.simulated import NOTICE, SimulatedPlanner
from deployments.stages.start import start_replica
from deployments.telemetry.logs import about, join_serve
from deployments.telemetry.replica_metrics import ReplicaMeter
from deployments.telemetry.tracing import parts

if TYPE_CHECKING:
    from acestep.lm.planner import Planner

log = logging.getLogger(__name__)
SIMULATED_SLOTS = 16


class PlannerDeployment:
    """Plans songs. One engine thread steps every song in flight; the methods here only queue and wait.

    Where the tier table or a setting switches the planner off, the replica runs without a model and says so.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        join_serve()
        self._leaving = False  # told to go while it started, Serve still looks at its health, and logs a trace
        self.args = parse_args(PlannerArgs, args, "lm")
        self.lora_roots = adapter_roots(self.args.lora_roots)
        start = start_replica("plan", self.args)
        self._planner: Planner | SimulatedPlanner | None = None
        if not start.settings.lm_enabled or start.settings.planner is None:
            reason = start.settings.lm_reason
            self.info = start.info(model=str(start.model), model_hash=None, notice=None, disabled=reason)
            log.warning("the planner is off here: %s", reason)
            return
        if self.args.engine == "simulated":
            model = str(start.model or "simulated")
            self._planner = SimulatedPlanner(start.profile, model, SIMULATED_SLOTS)
            self.info = start.info(model=model, model_hash=None, notice=NOTICE, capacity=SIMULATED_SLOTS)
            return
        from acestep.lm.planner import Planner

        checkpoint = start.checkpoint()
        began = time.monotonic()
        self._planner = Planner.load(
            checkpoint.path, start.settings.planner, name=checkpoint.name, model_hash=checkpoint.hash
        )
        self.info = start.info(
            model=checkpoint.name,
            model_hash=checkpoint.hash,
            notice=checkpoint.notice,
            capacity=start.settings.planner.slots,
            load_s=time.monotonic() - began,
        )
        self._meter = ReplicaMeter(self._planner.stats, start.device, self.info.load_s)
        log.info("planner %s is ready on %s", self.info.model, self.info.device)

    @property
    def planner(self) -> Planner | SimulatedPlanner:
        if self._planner is None:
            raise Unavailable(f"the planner is off: {self.info.disabled}")
        return self._planner

    async def plan(
        self,
        job_id: str,
        request: dict[str, Any],
        max_duration: float,
        priority: float = 0.0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Plan a `SongRequest` whose seeds are drawn. Streams progress, then the `Plan`."""
        from acestep.lm.work import PlanWork

        about(job_id)
        try:
            work = PlanWork(with_planner_adapters(SongRequest.model_validate(request), self.lora_roots), max_duration)
        except AceStepError as error:
            yield failure(error)
            return
        async for message in self._run(work, priority, timeout_s, id=ticket_id(job_id)):
            if took := message.get("result", {}).get("timings"):
                names = ("metadata", "codes", *(["scores"] if took["scores_s"] else []))
                spent = {name: took[f"{name}_s"] for name in names}
                parts(spent, job_id=job_id)
                log.info(
                    "job %s planned in %.2f s after %.2f s in the queue",
                    job_id,
                    sum(spent.values()),
                    took["queued_s"],
                )
            yield message

    async def ask(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        """understand, inspire or format: one `{"result": ...}` (a `Sample`) or `{"error": ...}`."""
        from acestep.lm.work import FormatWork, InspireWork, UnderstandWork

        work = {"understand": UnderstandWork, "inspire": InspireWork, "format": FormatWork}[kind](**fields)
        last: dict[str, Any] = {}
        async for message in self._run(work):
            last = message
        return last

    async def _run(
        self, work: Any, priority: float = 0.0, timeout_s: float | None = None, id: str | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        mailbox = ProgressMailbox()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            planner = self.planner
            ticket = planner.submit(work, id=id, priority=priority, deadline=deadline, on_progress=mailbox.put)
            async for item in follow(ticket, mailbox, planner.cancel):
                if isinstance(item, Progress):
                    yield {"progress": item.model_dump()}
                else:
                    yield {"result": item.model_dump(mode="json")}
        except AceStepError as error:
            yield failure(error)

    async def describe(self) -> dict[str, Any]:
        return {**self.info.to_dict(), "stats": self._planner.stats() if self._planner else {}}

    def check_health(self) -> None:
        if not self._leaving and self._planner is not None and not self._planner.stats()["alive"]:
            raise RuntimeError("the planner's engine thread has ended")

    def __del__(self) -> None:
        self._leaving = True
        if meter := getattr(self, "_meter", None):
            meter.close()
        if planner := getattr(self, "_planner", None):
            planner.close()
