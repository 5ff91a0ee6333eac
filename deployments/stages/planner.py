"""The planner stage as a Serve deployment: a thin shell over `acestep.lm.planner`."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from acestep.errors import AceStepError, Unavailable
from acestep.request import SongRequest
from acestep.song import Progress
from deployments.config.args import PlannerArgs, parse_args
from deployments.stages.adapters import adapter_roots, with_adapters
from deployments.stages.messages import failure
from deployments.stages.simulated import NOTICE, SimulatedPlanner
from deployments.stages.stage import StageDeployment
from deployments.stages.start import start_replica
from deployments.telemetry.logs import about
from deployments.telemetry.replica_metrics import ReplicaMeter
from deployments.telemetry.tracing import parts

log = logging.getLogger(__name__)
SIMULATED_SLOTS = 16


class PlannerDeployment(StageDeployment):
    """Plans songs.

    Where the tier table or a setting switches the planner off, the replica runs without a model and says so.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        self.args = parse_args(PlannerArgs, args, "lm")
        self.lora_roots = adapter_roots(self.args.lora_roots)
        start = start_replica("plan", self.args)
        if not start.settings.lm_enabled or start.settings.planner is None:
            reason = start.settings.lm_reason
            self.info = start.info(model=str(start.model), model_hash=None, notice=None, disabled=reason)
            log.warning("the planner is off here: %s", reason)
            return
        if self.args.engine == "simulated":
            model = str(start.model or "simulated")
            self.engine = SimulatedPlanner(start.profile, model, SIMULATED_SLOTS)
            self.info = start.info(model=model, model_hash=None, notice=NOTICE, capacity=SIMULATED_SLOTS)
            return
        from acestep.lm.planner import Planner

        checkpoint = start.checkpoint()
        began = time.monotonic()
        self.engine = Planner.load(
            checkpoint.path, start.settings.planner, name=checkpoint.name, model_hash=checkpoint.hash
        )
        self.info = start.info(
            model=checkpoint.name,
            model_hash=checkpoint.hash,
            notice=checkpoint.notice,
            capacity=start.settings.planner.slots,
            load_s=time.monotonic() - began,
        )
        self.meter = ReplicaMeter(self.engine.stats, start.device, self.info.load_s)
        log.info("planner %s is ready on %s", self.info.model, self.info.device)

    async def plan(
        self,
        job_id: str,
        request: dict[str, Any],
        max_duration: float,
        timeout_s: float | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Plan a `SongRequest` whose seeds are drawn. Streams progress, then the `Plan`."""
        from acestep.lm.work import PlanWork

        about(job_id)
        try:
            parsed = with_adapters(SongRequest.model_validate(request), self.lora_roots, "planner")
            async for item in self._made(PlanWork(parsed, max_duration), job_id, timeout_s):
                if isinstance(item, Progress):
                    yield {"progress": item.model_dump()}
                    continue
                took = item.timings
                spent = {"metadata": took.metadata_s, "codes": took.codes_s, "scores": took.scores_s}
                parts(spent, job_id=job_id)
                in_s = sum(spent.values())
                log.info("job %s planned in %.2f s after %.2f s in the queue", job_id, in_s, took.queued_s)
                yield {"result": item.model_dump(mode="json")}
        except AceStepError as error:
            yield failure(error)

    async def ask(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        """understand, inspire or format: one `{"result": ...}` (a `Sample`) or `{"error": ...}`."""
        from acestep.lm.work import FormatWork, InspireWork, UnderstandWork

        work = {"understand": UnderstandWork, "inspire": InspireWork, "format": FormatWork}[kind](**fields)
        try:
            async for item in self._made(work):
                sample = item
            return {"result": sample.model_dump(mode="json")}
        except AceStepError as error:
            return failure(error)

    def _made(self, work: Any, *options: Any) -> AsyncIterator[Any]:
        if self.engine is None:
            raise Unavailable(f"the planner is off: {self.info.disabled}")
        return self.results(work, *options)
