"""Short questions to the stages that somebody waits for, beside songs: describe, write or improve a song's text, and read codes from audio."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from acestep.errors import InvalidRequest, Unavailable, error_from_dict
from acestep.lm.work import Sample
from deployments.config.args import Role
from deployments.dispatch.calls import REPLICA_LOST, Calls
from deployments.dispatch.routing import Routing, why_none
from deployments.fleet.watch import Fleet
from deployments.jobs import retry
from deployments.scheduling.choose import choose_pool

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
    """Finds a replica, asks it, and asks another one where the first was lost."""

    def __init__(self, fleet: Fleet, routing: Routing, calls: Calls) -> None:
        self.fleet = fleet
        self.routing = routing
        self.calls = calls

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
        try:
            async with asyncio.timeout(LOOK_S):
                answer = await self.calls.ask(self.fleet.handle(app, "render"), "loras", name, whole)
        except TimeoutError:
            return f"did not answer within {LOOK_S:g} s"
        except REPLICA_LOST as lost:
            return f"lost its replica ({type(lost).__name__})"
        if "error" not in answer:
            entries: list[dict[str, Any]] = answer["result"]
            return entries
        refusal = error_from_dict(answer["error"])
        return refusal if isinstance(refusal, InvalidRequest) else refusal.message

    async def _ask(self, kind: str, fields: dict[str, Any]) -> Sample:
        longest_s = self.routing.longest_s(self.fleet.view)
        answer = await self._call("plan", "ask", kind, {**fields, "max_duration": longest_s})
        return Sample.model_validate(answer)

    async def _call(self, role: Role, method: str, *arguments: Any) -> Any:
        for tried in itertools.count(1):
            pool, runs = self._pool(role)
            error: Exception
            try:
                async with asyncio.timeout(None if runs else COLD_START_S):
                    answer = await self.calls.ask(self.fleet.handle(pool, role), method, *arguments)
                if "error" not in answer:
                    return answer["result"]
                error = error_from_dict(answer["error"])
                if not retry.elsewhere(error) or tried == retry.TRIES:
                    raise error
            except TimeoutError:
                raise Unavailable(why_none(self.fleet.view, role), retry_after=5) from None
            except REPLICA_LOST as lost:
                if tried == retry.TRIES:
                    raise Unavailable(f"pool {pool} lost its replica {tried} times in a row", retry_after=5) from lost
                error = lost
            log.info("pool %s could not answer (%s); asking again", pool, error)
            await asyncio.sleep(retry.ASK.pause_s(tried))
        raise AssertionError("unreachable: the last try returns or raises")

    def _pool(self, role: Role) -> tuple[str, bool]:
        """A pool to ask, and whether it has a running replica: a caller who does not come again later is worth waking one at zero.

        Raises:
            Unavailable: the fleet has none that runs now or starts when it is asked.
        """
        view = self.fleet.view
        found = choose_pool(self.routing.pools(view), role)
        if found is not None and (found.running or ((pool := view.get(found.name)) and view.wakes(pool))):
            return found.name, found.running > 0
        raise Unavailable(why_none(view, role), retry_after=5)
