"""What planner and renderer have in common as Serve deployments: one engine thread steps all work, the methods only queue and wait."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from acestep.song import Progress
from deployments.stages.messages import follow, ticket_id
from deployments.stages.start import ReplicaInfo
from deployments.telemetry.logs import join_serve
from deployments.telemetry.replica_metrics import ReplicaMeter


class StageDeployment:
    """Attributes: `engine` with the verbs of `acestep.worker.EngineThread`, None where nothing is to be run; `info`, what it says of itself."""

    info: ReplicaInfo
    engine: Any = None
    meter: ReplicaMeter | None = None
    leaving = False  # told to go while it started, Serve still looks at its health, and logs a trace

    def __init__(self) -> None:
        join_serve()

    def results(
        self, work: Any, job_id: str | None = None, timeout_s: float | None = None
    ) -> AsyncIterator[Progress | Any]:
        """Progress of a piece of work, then what the engine made; an `AceStepError` where it refused it, or failed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        named = {} if job_id is None else {"id": ticket_id(job_id)}
        return follow(partial(self.engine.submit, work, deadline=deadline, **named), self.engine.cancel)

    async def describe(self) -> dict[str, Any]:
        return {**self.info.to_dict(), "stats": self.engine.stats() if self.engine else {}}

    def check_health(self) -> None:
        """Serve calls it every few seconds."""
        if not self.leaving and self.engine is not None and not self.engine.alive:
            raise RuntimeError("the engine's thread has ended")
        if self.meter is not None:
            self.meter.sample()

    def __del__(self) -> None:
        self.leaving = True
        if self.engine is not None:
            self.engine.close()
