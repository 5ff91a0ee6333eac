"""Short questions to the stages, beside songs: describe, write or improve a song's text, and read codes from audio."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from acestep.errors import InvalidRequest, Unavailable, error_from_dict
from acestep.lm.work import Sample
from acestep.request import MAX_DURATION_S
from deployments.config.args import Role
from deployments.dispatch.calls import REPLICA_LOST
from deployments.dispatch.routing import NoPool, Routing
from deployments.fleet.watch import Fleet
from deployments.jobs import retry
from deployments.scheduling.choose import choose_pool, fleet_limits

log = logging.getLogger(__name__)

COLD_START_S = 50.0  # how long a question waits for a replica to start: shorter than proxies wait for an answer


LOOK_S = 10.0  # for a look into folders, which may lie on a network


@dataclass
class Looked:
    """What the renderer pools said of adapters.

    Attributes:
        found: Model and entries (of `deployments.stages.adapters.entry`) of each pool that answered.
        refused: Answers of pools that have no such adapter.
        unknown: Pools that could not be asked, and why.
    """

    found: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)
    refused: list[InvalidRequest] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


class Questions:
    """Finds a replica, asks it, and asks another one where the first was lost.

    Args:
        patient: Raise `NoPool` where a replica may come, so that a job waits, instead of `Unavailable`, as a request needs it.
    """

    def __init__(self, fleet: Fleet, routing: Routing, *, patient: bool = False) -> None:
        self.fleet = fleet
        self.routing = routing
        self.patient = patient

    async def inspire(self, **fields: Any) -> Sample:
        """A whole song description for a wish. Fields of `acestep.lm.work.InspireWork`."""
        return await self._ask("inspire", fields)

    async def format(self, **fields: Any) -> Sample:
        """The same song described better. Fields of `acestep.lm.work.FormatWork`."""
        return await self._ask("format", fields)

    async def understand(self, codes: Sequence[int], **fields: Any) -> Sample:
        """What audio codes sound like. Fields of `acestep.lm.work.UnderstandWork`."""
        return await self._ask("understand", {"codes": tuple(codes), **fields})

    async def codes(self, name: str) -> tuple[int, ...]:
        """5 Hz audio codes of a stored file."""
        answer = await self._call("render", "codes", name)
        return tuple(answer)

    async def loras(self, name: str | None = None, *, whole: bool = False) -> Looked:
        """What the renderers' LoRA folders hold: all of it, or the adapter of a name. Of each pool one replica that runs is asked.

        Args:
            whole: Have the adapter's weights read, too.
        """
        view = self.fleet.view
        pools = view.of("render")
        running = [pool for pool in pools if pool.running]
        looked = Looked(
            unknown=[f"{p.app}: {view.why_not_ready(p) or 'no replica runs'}" for p in pools if not p.running]
        )
        answers = await asyncio.gather(*(self._look(pool.app, name, whole) for pool in running))
        for pool, answer in zip(running, answers, strict=True):
            if isinstance(answer, list):
                looked.found.append((str((pool.info or {}).get("model", pool.app)), answer))
            elif isinstance(answer, InvalidRequest):
                looked.refused.append(answer)
            else:
                looked.unknown.append(f"{pool.app}: {answer}")
        return looked

    async def _look(self, app: str, name: str | None, whole: bool) -> list[dict[str, Any]] | InvalidRequest | str:
        response: Any = self.fleet.handle(app, "render").loras.remote(name, whole)
        try:
            async with asyncio.timeout(LOOK_S):
                answer = await response
        except TimeoutError:
            response.cancel()
            return f"did not answer within {LOOK_S:g} s"
        except REPLICA_LOST as lost:
            return f"lost its replica ({type(lost).__name__})"
        if "error" not in answer:
            entries: list[dict[str, Any]] = answer["result"]
            return entries
        refusal = error_from_dict(answer["error"])
        return refusal if isinstance(refusal, InvalidRequest) else refusal.message

    def columns(self, role: Role) -> dict[str, Any]:
        """What a job's row says while it waits to ask a stage."""
        return self.routing.question(self.fleet.view, role)

    async def _ask(self, kind: str, fields: dict[str, Any]) -> Sample:
        limits = fleet_limits(self.routing.pools(self.fleet.view))
        longest = max((limit.max_duration for limit in limits), default=MAX_DURATION_S)
        answer = await self._call("plan", "ask", kind, {**fields, "max_duration": longest})
        return Sample.model_validate(answer)

    async def _call(self, role: Role, method: str, *arguments: Any) -> Any:
        for tried in itertools.count(1):
            pool, runs = self._pool(role)
            response = getattr(self.fleet.handle(pool, role), method).remote(*arguments)
            error: Exception
            try:
                async with asyncio.timeout(None if runs else COLD_START_S):
                    answer = await response
                if "error" not in answer:
                    return answer["result"]
                error = error_from_dict(answer["error"])
                if not retry.elsewhere(error) or tried == retry.TRIES:
                    raise error
            except TimeoutError:
                response.cancel()
                raise Unavailable(self._why_none(role), retry_after=5) from None
            except REPLICA_LOST as lost:
                if tried == retry.TRIES:
                    raise Unavailable(f"pool {pool} lost its replica {tried} times in a row", retry_after=5) from lost
                error = lost
            except asyncio.CancelledError:
                response.cancel()
                raise
            log.info("pool %s could not answer (%s); asking again", pool, error)
            await asyncio.sleep(retry.ASK.pause_s(tried))
        raise AssertionError("unreachable: the last try returns or raises")

    def _pool(self, role: Role) -> tuple[str, bool]:
        """A pool to ask, and whether it has a running replica: a caller who does not come again later is worth waking one at zero.

        Raises:
            NoPool: none runs now, and the caller is patient.
            Unavailable: the fleet has none, or none that runs now or starts when it is asked.
        """
        view = self.fleet.view
        found = choose_pool(self.routing.pools(view), role)
        if found is not None and found.running:
            return found.name, True
        pools = view.of(role)
        if found is not None and not self.patient and (pool := view.get(found.name)) and view.wakes(pool):
            return found.name, False
        never = (view.at > 0 and not pools) or (bool(pools) and all((p.info or {}).get("disabled") for p in pools))
        if self.patient and not never:
            raise NoPool(self._why_none(role))
        raise Unavailable(self._why_none(role), retry_after=5)

    def _why_none(self, role: Role) -> str:
        view, name = self.fleet.view, "planner" if role == "plan" else "renderer"
        pools = view.of(role)
        off = [str(r) for p in pools if (r := (p.info or {}).get("disabled"))]
        why = "; ".join(off or [f"{p.app}: {view.why_not_ready(p) or 'has not described itself yet'}" for p in pools])
        return f"no {name} can answer: {why or f'this fleet has no {name} pool'}"
