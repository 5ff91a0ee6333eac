"""A planner and a renderer that take the time of a cost profile and compute nothing.

For driving large fleets without cards: `engine: simulated` in a pool's args, never a default. Plans are random but valid and depend on the
seed alone; audio is a quiet seeded hum of the right length. Everything around the engines is the real thing.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acestep.errors import Unavailable
from acestep.plan import CODES_PER_SECOND, NUM_CODES, Metadata, Plan, PlanTimings
from acestep.request import SongRequest
from acestep.sizing.cost import (
    PlannerCost,
    Profile,
    RendererCost,
    expected_duration,
    needs_codes,
    plan_rows,
    plan_seconds,
    render_seconds,
)
from acestep.song import SAMPLE_RATE, Progress, RenderTimings
from acestep.worker import EngineThread, Ticket

TICK_S = 0.005
NOTICE = "simulated engine: no model ran"


@dataclass
class _Running:
    ticket: Ticket[Any, Any]
    seconds: float  # alone
    began: float
    done: float = 0.0
    pace: float = 1.0  # seconds of it per second, others beside it


class SimulatedEngine:
    """Holds each ticket for its seconds of work, longer where others share the device; `slots` rows at once."""

    def __init__(self, slots: int, stage: str) -> None:
        self.slots = slots
        self.stage = stage
        self._running: dict[str, _Running] = {}
        self._at = time.monotonic()

    def has_room(self, ticket: Ticket[Any, Any]) -> bool:
        return self._rows() + ticket.work.rows <= self.slots

    def add(self, ticket: Ticket[Any, Any]) -> None:
        self._work_off()
        self._running[ticket.id] = _Running(ticket, ticket.work.seconds(), self._at)
        self._share()

    def step(self) -> bool:
        if not self._running:
            return False
        next_s = min((r.seconds - r.done) / r.pace for r in self._running.values())
        time.sleep(max(0.0, min(TICK_S, next_s)))
        self._work_off()
        for running in list(self._running.values()):
            share = 1.0 if running.seconds <= 0 else min(1.0, running.done / running.seconds)
            total = running.ticket.work.units()
            running.ticket.progress(Progress(stage=self.stage, done=int(share * total), total=total))
            if share >= 1.0:
                self.remove(running.ticket)
                running.ticket.finish(running.ticket.work.result(self._at - running.began))
        return True

    def _rows(self) -> int:
        return sum(r.ticket.work.rows for r in self._running.values())

    def _work_off(self) -> None:
        now = time.monotonic()
        for running in self._running.values():
            running.done += (now - self._at) * running.pace
        self._at = now

    def _share(self) -> None:
        rows = self._rows()
        for running in self._running.values():
            running.pace = running.seconds / max(1e-9, running.ticket.work.seconds(rows)) or 1.0

    def remove(self, ticket: Ticket[Any, Any]) -> None:
        self._work_off()
        self._running.pop(ticket.id, None)
        self._share()

    def reset(self) -> None:
        self._running.clear()

    def stats(self) -> dict[str, Any]:
        return {"slots": self.slots, "slots_used": self._rows()}


@dataclass(frozen=True)
class SimulatedPlan:
    """One planning job."""

    request: SongRequest
    max_duration: float
    cost: PlannerCost
    slots: int

    @property
    def rows(self) -> int:
        return min(self.slots, plan_rows(self.request, self.slots))

    def seconds(self, rows: int = 0) -> float:
        """With so many rows in use, its own included."""
        others = max(0, rows - self.rows)
        return plan_seconds(self.request, self.cost, self._duration(), slots=self.slots, busy_rows=others).wall_s

    def units(self) -> int:
        return int(self._duration() * CODES_PER_SECOND) * self.request.batch_size if needs_codes(self.request) else 0

    def _duration(self) -> float:
        return min(self.max_duration, expected_duration(self.request)[0])

    def result(self, seconds: float) -> Plan:
        r = self.request
        dice = random.Random(r.seeds[0])
        metadata = Metadata(
            bpm=r.bpm or dice.randint(60, 180),
            duration=self._duration(),
            keyscale=r.key_scale or "C major",
            language=r.vocal_language or "en",
            timesignature=r.time_signature or "4",
        )
        length = int(self._duration() * CODES_PER_SECOND)
        codes = None
        if needs_codes(r):
            codes = tuple(tuple(random.Random(s).choices(range(NUM_CODES), k=length)) for s in r.seeds)
        timings = PlanTimings(metadata_s=seconds)
        return Plan(metadata=metadata, codes=codes, lm_seeds=r.seeds, model="simulated", notice=NOTICE, timings=timings)


@dataclass(frozen=True)
class SimulatedRender:
    """Rendering of some items of a request."""

    request: SongRequest
    plan: Plan
    items: tuple[int, ...]
    cost: RendererCost
    model: str
    rows: int = 1

    def seconds(self, rows: int = 1) -> float:
        return render_seconds(self.request, self.cost, self._duration(), model=self.model, items=len(self.items)).wall_s

    def units(self) -> int:
        return 100

    def _duration(self) -> float:
        return self.request.duration or self.plan.metadata.duration or 60.0

    def result(self, seconds: float) -> Any:
        import torch

        from acestep.dit.work import Rendered, RenderedItem

        rendered = []
        for item in self.items:
            seed = self.request.seeds[item]
            second = torch.randn(2, SAMPLE_RATE, generator=torch.Generator().manual_seed(seed)) * 0.05
            samples = round(self._duration() * SAMPLE_RATE)
            audio = second.repeat(1, -(-samples // SAMPLE_RATE))[:, :samples].contiguous()
            rendered.append(RenderedItem(item, seed, audio))
        return Rendered(tuple(rendered), RenderTimings(denoise_s=seconds), {"engine": "simulated"})


class SimulatedPlanner(EngineThread[Any, Any]):
    """`acestep.lm.planner.Planner`, for `PlanWork` only."""

    def __init__(self, profile: Profile, model: str, slots: int) -> None:
        self._cost, self._slots = profile.planner(model), slots
        super().__init__(SimulatedEngine(slots, "planning"), name="simulated-planner")

    def submit(self, work: Any, **options: Any) -> Ticket[Any, Any]:
        from acestep.lm.work import PlanWork

        if not isinstance(work, PlanWork):
            raise Unavailable("the simulated engine writes no texts")
        return super().submit(SimulatedPlan(work.request, work.max_duration, self._cost, self._slots), **options)


class SimulatedRenderer(EngineThread[Any, Any]):
    """`acestep.dit.renderer.Renderer`, for `RenderWork` only."""

    adapter_target = None  # there is no model that an adapter could fit

    def __init__(self, profile: Profile, model: str) -> None:
        self._cost, self._model = profile.renderer(model), model
        super().__init__(SimulatedEngine(1, "rendering"), name="simulated-renderer")

    def submit(self, work: Any, **options: Any) -> Ticket[Any, Any]:
        job = SimulatedRender(work.request, work.plan, work.indices, self._cost, self._model)
        return super().submit(job, **options)

    def submit_codes(self, path: Path) -> Ticket[Any, Any]:
        raise Unavailable("the simulated engine reads no audio")
