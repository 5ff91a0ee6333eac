"""The router's side of the fleet: what pools can do before and after a replica said so, places, and what it learns from songs."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from acestep.cost import render_seconds
from acestep.gpu_config import get_gpu_config, get_limits
from acestep.plan import Metadata, Plan
from acestep.profiles import find
from acestep.request import SongRequest
from acestep.song import RenderTimings, Song, SongItem
from deployments import fleet as fleet_module
from deployments.api.health import readiness
from deployments.build import build_config, parse_tiers
from deployments.config import PlannerArgs, PoolArgs, RendererArgs
from deployments.fleet import Fleet, FleetView, Node, Pool
from deployments.jobs.backlog import Backlog
from deployments.least_busy import ranked
from deployments.placement import PoolState
from deployments.routing import Routing, pool_limits

GPU = {"acestep/role": "gpu"}


def node(tier: str) -> Node:
    return Node("host", {**GPU, "acestep/gpu-tier": tier}, 1.0, 8.0)


def renderer(tier: str = "tier4", running: int = 1, **fields: Any) -> Pool:
    info = {
        "model": "acestep-v15-turbo", "limits": asdict(get_limits(get_gpu_config(tier), "render")), "tasks": ["text2music"],
        "profile": find(tier=tier).model_dump(mode="json"),
    }  # fmt: skip
    return Pool("dit", "render", RendererArgs(), status="RUNNING", running=running, info={**info, **fields})


# -- what pools can do


def test_a_shared_card_at_zero_has_the_limits_it_will_have_when_it_runs() -> None:
    """Else a song is accepted that the replica refuses once it is there."""
    config = build_config(parse_tiers("tier4"), scale_to_zero=True)
    args = next(a["args"] for a in config["applications"] if a["name"] == "dit-tier4")
    limits = pool_limits(Pool("dit-tier4", "render", RendererArgs(**args)))
    assert limits is not None
    assert (limits.max_duration, limits.max_batch) == (240, 2)


def test_a_pool_of_several_tiers_can_do_what_its_smallest_card_can() -> None:
    said = renderer("unlimited")
    pool = replace(said, args=RendererArgs(tiers=("unlimited", "tier5")))
    limits = pool_limits(pool)
    assert limits is not None
    assert (limits.tier, limits.max_duration) == ("tier5", 360)


# -- what is missing


def view(args: PoolArgs, *nodes: Node, **pool: Any) -> FleetView:
    kind = "plan" if isinstance(args, PlannerArgs) else "render"
    return FleetView((Pool("dit-tier6", kind, args, **{"status": "RUNNING", **pool}),), nodes=nodes)


AT_ZERO = {"tiers": ("tier6",), "min_replicas": 0, "pool": "dit-tier6"}


def test_a_pool_at_zero_is_ready_only_where_it_can_come() -> None:
    gone = readiness(view(RendererArgs(**AT_ZERO), node("tier4")))
    assert not gone[0]
    assert gone[1]["missing"][0] == "no renderer is running"
    assert "ray start --labels=acestep/role=gpu,acestep/gpu-tier=tier6" in gone[1]["missing"][1]
    assert "acestep/gpu-tier=tier6" in gone[1]["pools"][0]["reason"]

    here = readiness(view(RendererArgs(**AT_ZERO), node("tier6")))
    assert here == (True, {**here[1], "ready": True, "missing": []})
    assert here[1]["pools"][0]["reason"] == "no replica; one starts when work arrives"

    assert readiness(view(RendererArgs(**AT_ZERO, nodes_on_demand=True)))[1]["missing"] == []
    assert not readiness(view(RendererArgs(**AT_ZERO), node("tier6"), status="DEPLOY_FAILED", message="X"))[0]


def test_a_node_that_is_there_is_not_asked_for() -> None:
    told = readiness(view(RendererArgs(tiers=("tier6",)), node("tier6"), starting=1))[1]
    assert told["pools"][0]["reason"].startswith("a replica is starting and loading its model, or waits for a free GPU")
    assert told["missing"] == ["no renderer is running"]


def test_of_several_tiers_the_label_of_one_is_named() -> None:
    (_, told) = readiness(view(RendererArgs(tiers=("tier5", "tier6"))))[1]["missing"]
    assert "acestep/gpu-tier=tier5 (or tier6)" in told


async def test_other_replicas_are_asked_at_once_what_they_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an update they may serve another model; what the last ones said would send jobs wrong for as long as it is kept."""
    asked: list[str] = []
    replicas = ["old"]

    async def describe(handle: object) -> dict[str, Any]:
        asked.append(replicas[0])
        return {"model": replicas[0]}

    def details() -> dict[str, Any]:
        running = [{"state": "RUNNING", "replica_id": r, "node_id": "n", "actor_name": r} for r in replicas]
        return {"applications": {"dit": {"status": "RUNNING", "deployments": {"dit": {"replicas": running}}}}}

    watched = Fleet()
    monkeypatch.setattr(fleet_module, "_call", describe)
    monkeypatch.setattr(fleet_module, "_serve_details", details)
    monkeypatch.setattr(fleet_module, "_live_nodes", tuple)
    monkeypatch.setattr(watched, "handle", lambda *_: None)

    async def look() -> object:
        await watched.refresh()
        await asyncio.gather(*watched._describing.values())
        await watched.refresh()
        (pool,) = watched.view.pools
        return (pool.info or {})["model"]

    assert (await look(), asked) == ("old", ["old"])
    assert (await look(), asked) == ("old", ["old"])
    replicas[:] = ["new"]
    assert (await look(), asked) == ("new", ["old", "new"])


# -- places


async def test_each_part_of_a_spread_batch_holds_a_place_of_its_own() -> None:
    routing = Routing()
    routing.state(FleetView((renderer(running=2),)))
    entered = 0

    async def part() -> None:
        nonlocal entered
        async with routing.occupy("dit", "render", 1.0, 1.0):
            entered += 1
            await asyncio.sleep(3600)

    tasks = [asyncio.create_task(part()) for _ in range(6)]
    await asyncio.sleep(0.01)
    assert entered == 4  # two replicas: one song each, and one to follow
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(1), routing.occupy("dit", "render", 1.0, 1.0):
        pass


def placed(routing: Routing, *, newcomer: bool = False) -> PoolState:
    return routing.state(FleetView((renderer(running=2),)), newcomer=newcomer).pools[0]


async def test_what_runs_here_is_known_to_the_moment_and_what_follows_waits() -> None:
    routing = Routing()
    placed(routing)
    async with routing.occupy("dit", "render", 30.0, 30.0), routing.occupy("dit", "render", 10.0, 10.0):
        both = placed(routing)
        assert both.free_in_s == pytest.approx((30.0, 10.0), abs=0.5)
        assert (both.busy, both.waiting_s) == (2, 0.0)
        async with routing.occupy("dit", "render", 7.0, 7.0):
            assert placed(routing).waiting_s == 7.0
    assert placed(routing).free_in_s == (0.0, 0.0)


def test_a_newcomer_waits_for_everything_and_a_job_whose_turn_has_come_for_nothing() -> None:
    routing = Routing()
    routing.set_backlogs({"dit": Backlog(waiting_s=100.0, upcoming_s=20.0, later_s=300.0)})
    found = placed(routing, newcomer=True)
    assert found.waiting_s == 100.0
    assert sum(work for _, work, _ in found.coming) == pytest.approx(320.0)
    assert (placed(routing).waiting_s, placed(routing).coming) == (0.0, ())


def test_growth_is_foreseen_only_where_the_pool_scales() -> None:
    grows = replace(renderer(), args=RendererArgs(pool="dit", min_replicas=0, max_replicas=4, drain_backlog_s=20))
    (state,) = Routing().state(FleetView((grows,))).pools
    assert (state.drain_s, state.max_replicas, state.target) == (20.0, 4, 0)
    busy = Routing()
    busy.set_backlogs({"dit": Backlog(waiting_s=50.0)})
    assert busy.state(FleetView((grows,))).pools[0].target == 3
    assert placed(Routing()).drain_s is None


def test_the_least_busy_replica_comes_first() -> None:
    replicas: list[Any] = [SimpleNamespace(replica_id=name) for name in "abcd"]
    held: Any = {"a": 1, "b": 0, "c": 2, "d": 0}
    assert [[r.replica_id for r in rank] for rank in ranked(replicas, held)] == [["b", "d"], ["a"], ["c"]]
    assert ranked([], {}) == []


# -- what is learnt


@pytest.mark.parametrize("together", [1, 4])
async def test_what_a_song_took_is_learnt_under_load_but_not_from_shared_steps(together: int) -> None:
    routing = Routing()
    fleet = FleetView((renderer(running=1, together=together),))
    routing.state(fleet)
    request, plan = SongRequest(prompt="x", duration=60).with_seeds(), Plan(metadata=Metadata(duration=60))
    profile = find(tier="tier4")
    foretold = render_seconds(
        request, profile.renderer("turbo"), 60.0, model="acestep-v15-turbo", output_s=profile.output_s
    )
    item = SongItem(index=0, seed=1, duration=60.0, samples=60 * 48_000, files=())
    song = Song(
        items=(item,), plan=plan, renderer="x", timings=RenderTimings(denoise_s=3 * foretold.wall_s, queued_s=900.0)
    )
    async with routing.occupy("dit", "render", 1.0, 1.0) as first, routing.occupy("dit", "render", 1.0, 1.0) as second:
        pass
    assert first.alone == second.alone == (together == 1)
    routing.learn_render("dit", request, plan, song)
    assert routing.corrections.factor("dit", "render") == pytest.approx(3.0, rel=0.02)
