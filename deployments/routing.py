"""Which pools a job goes to, and how much this router may have in flight.

Joins what the fleet says (`fleet.FleetView`) with the pure choice of a pool. Holds the little state that a router has: the seconds of work
it has given to each pool and not got back.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from acestep.gpu_config import Limits
from acestep.limits import apply_limits, best_limits
from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from deployments.fleet import FleetView, Pool
from deployments.jobs.store import Job

TASKS_WITHOUT_PLANNER = ("cover", "cover-nofsq", "repaint", "extract")


class NoPool(Exception):
    """No pool can take the work now; the text says what is missing."""


@dataclass(frozen=True)
class Choice:
    """Where a stage runs, with the request as that place can do it."""

    request: SongRequest
    adjustments: tuple[Adjustment, ...]
    planner: str | None
    renderer: str
    max_duration: float
    est_plan_s: float
    est_render_s: float
    reason: str


def needs_planner(request: SongRequest) -> bool:
    """Whether any phase of the planner runs for this request (decision flow of the planner protocol)."""
    if request.task in TASKS_WITHOUT_PLANNER:
        return False
    if request.plan is not None:
        return request.thinking and not request.plan.codes and request.audio_codes is None
    return request.thinking or request.use_cot_metas or request.use_cot_caption or request.use_cot_language


class Routing:
    """Chooses pools and counts what is in flight."""

    def __init__(self) -> None:
        self._in_flight: dict[str, int] = defaultdict(int)
        self._seconds: dict[str, float] = defaultdict(float)

    def admit(self, view: FleetView, request: SongRequest) -> tuple[SongRequest, tuple[Adjustment, ...]]:
        """The request as the fleet can do it. Before any renderer is known nothing is changed; dispatch does it then."""
        offers = [limits for p in view.of("render") if (limits := pool_limits(p))]
        if not offers:
            return request, ()
        clamped, adjustments = apply_limits(request, best_limits(request, offers))
        return clamped, tuple(adjustments)

    def window(self, view: FleetView) -> int:
        """How many jobs this router may hold: what the running replicas can work on, and some to follow."""
        planners = sum(p.running * int((p.info or {}).get("capacity", 1)) for p in view.of("plan"))
        renderers = sum(p.running for p in view.of("render"))
        return max(2, planners + 2 * renderers)

    def order(self, jobs: Sequence[Job]) -> list[Job]:
        return sorted(jobs, key=lambda j: (j.priority, j.created_at))

    def choose(
        self, view: FleetView, request: SongRequest, adjustments: Sequence[Adjustment], plan: Plan | None
    ) -> Choice:
        """Pools for what is left to do.

        Raises:
            NoPool: none can take it now.
            LimitExceeded: no pool of the fleet can do it, and the request is strict.
        """
        renderers = [(p, limits) for p in view.of("render") if p.running and (limits := pool_limits(p))]
        if not renderers:
            raise NoPool(_missing(view, "render", "renderer"))
        limits = best_limits(request, [r[1] for r in renderers])
        renderer = next(p for p, offer in renderers if offer is limits)
        request, more = apply_limits(request, limits)
        planner = None
        if plan is None and needs_planner(request):
            planners = [p for p in view.of("plan") if p.running and p.info]
            if not planners and not view.of("plan"):
                request, off = without_planner(request, "the fleet has no planner")
                more = [*more, *off]
            elif not planners:
                raise NoPool(_missing(view, "plan", "planner"))
            else:
                planner = min(planners, key=lambda p: self._in_flight[p.app])
        return Choice(
            request, (*adjustments, *more), planner.app if planner else None, renderer.app, limits.max_duration, 0.0, 0.0,
            f"plan on {planner.app if planner else 'nothing'}, render on {renderer.app}",
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def occupy(self, pool: str, seconds: float) -> AsyncIterator[None]:
        """Count a stage as in flight on a pool."""
        self._in_flight[pool] += 1
        self._seconds[pool] += seconds
        try:
            yield
        finally:
            self._in_flight[pool] -= 1
            self._seconds[pool] -= seconds


def pool_limits(pool: Pool) -> Limits | None:
    """What a pool's cards can do, as its replica said; None before one ran."""
    facts: Any = (pool.info or {}).get("limits")
    return Limits(**facts) if facts else None


def without_planner(request: SongRequest, reason: str) -> tuple[SongRequest, list[Adjustment]]:
    """The request with everything off that only a planner can do."""
    switches = ("thinking", "use_cot_metas", "use_cot_caption", "use_cot_language")
    on = [s for s in switches if getattr(request, s)]
    changed = request.model_copy(update=dict.fromkeys(on, False))
    asked = [s for s in on if s in request.model_fields_set]
    return changed, [Adjustment(field=s, asked=True, given=False, reason=reason) for s in asked or ["thinking"]]


def _missing(view: FleetView, role: Any, name: str) -> str:
    pools = view.of(role)
    if not pools:
        return f"the fleet has no {name} pool"
    return (
        "; ".join(f"{p.app}: {p.why_not_ready}" for p in pools if p.why_not_ready)
        or f"no {name} has described itself yet"
    )
