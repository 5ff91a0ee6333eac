"""Stages that answer at once or hang, for whole jobs through the real dispatcher and store: no replica, no model."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from acestep.errors import AceStepError
from acestep.plan import Metadata, Plan
from acestep.request import Adjustment, SongRequest
from acestep.song import Progress, RenderTimings, Song, SongItem
from deployments.dispatch.dispatcher import Dispatcher

if TYPE_CHECKING:
    from .conftest import Site


HANG = "hang"


@dataclass
class Stage:
    """Stands for the handles of both pools. `plan` and `render` hold what the next calls do: an exception, `HANG`, or (empty) succeed."""

    plan: list[Any] = field(default_factory=list)
    render: list[Any] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    told: tuple[Adjustment, ...] = ()  # what the planner says of its plans
    left: int = 0  # calls that were broken off

    def handle(self, app: str, role: str) -> Any:
        return _Handle(self)


@dataclass
class _Handle:
    stage: Stage

    def options(self, **_: Any) -> _Handle:
        return self

    def __getattr__(self, method: str) -> Any:
        stage = self.stage

        class Call:
            @staticmethod
            def remote(*arguments: Any) -> _Stream:
                stage.calls.append(method)
                todo = getattr(stage, method)
                return _Stream(stage, method, arguments, todo.pop(0) if todo else None)

        return Call


@dataclass
class _Stream:
    stage: Stage
    method: str
    arguments: tuple[Any, ...]
    todo: Any
    done: bool = False
    request_id: str = ""
    broken_off: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.request_id = f"request {len(self.stage.calls)} of {id(self.stage)}"

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        name = "planning" if self.method == "plan" else "rendering"
        yield {"progress": Progress(stage=name, done=1, total=4).model_dump()}
        if self.todo == HANG:
            await self.broken_off.wait()
            raise asyncio.CancelledError  # as gRPC's streams do
        if isinstance(self.todo, AceStepError):
            yield {"error": self.todo.to_dict()}
        elif self.todo is not None:
            raise self.todo
        self.done = True
        if self.method == "plan":
            plan = Plan(metadata=Metadata(duration=20.0), codes=((1,) * 100,), adjustments=self.stage.told)
            yield {"result": plan.model_dump(mode="json")}
        else:
            _, request, plan, items, *_ = self.arguments
            seeds = SongRequest.model_validate(request).seeds
            made = tuple(SongItem(index=i, seed=seeds[i], duration=20.0, samples=960_000) for i in items)
            song = Song(items=made, plan=Plan.model_validate(plan), renderer="turbo", timings=RenderTimings())
            yield {"result": song.model_dump(mode="json")}

    def cancel(self) -> None:
        self.stage.left += not (self.done or self.broken_off.is_set())
        self.broken_off.set()


@contextlib.asynccontextmanager
async def running(dispatcher: Dispatcher) -> AsyncIterator[None]:
    task = asyncio.create_task(dispatcher.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def submit(site: Site, path: str = "/v1/music", **fields: Any) -> str:
    answer = await site.client.post(path, json={"prompt": "quiet piano", "duration": 20, "seed": 7, **fields})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.01)
