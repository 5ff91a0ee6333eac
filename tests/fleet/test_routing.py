"""The router's side of the fleet: what pools can do before and after a replica said so, what a job finds there, and what the router learns from songs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest

from acestep.errors import InvalidRequest
from acestep.gpu_config import get_gpu_config, get_limits
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from acestep.sizing.cost import render_seconds
from acestep.sizing.profiles import find
from acestep.song import RenderTimings, Song, SongItem
from deployments.config.args import PlannerArgs, PoolArgs, RendererArgs
from deployments.config.build import build_config, parse_tiers
from deployments.dispatch.routing import NoPool, Routing, share_of_renderer
from deployments.fleet import sent
from deployments.fleet import watch as fleet_module
from deployments.fleet.pools import pool_limits
from deployments.fleet.replica_choice import AsMeant
from deployments.fleet.watch import Fleet, FleetView, Node, Pool, parse_details
from deployments.ingress.native.health import readiness
from deployments.jobs.store import Job
from deployments.jobs.waiting import Backlog, Row
from deployments.scheduling.choose import Decision
from deployments.scheduling.eta import remaining_s
from deployments.scheduling.fairness import Waiting, turn_of
from deployments.scheduling.line import Place, line_up
from deployments.scheduling.pool import FleetState
from deployments.scheduling.simulate import as_found_by

GPU = {"acestep/role": "gpu"}


def node(tier: str) -> Node:
    return Node("host", {**GPU, "acestep/gpu-tier": tier}, 1.0, 8.0)


def renderer(tier: str = "tier4", running: int = 1, **fields: Any) -> Pool:
    info = {
        "model": "acestep-v15-turbo", "limits": asdict(get_limits(get_gpu_config(tier), "render")), "tasks": ["text2music"],
        "profile": find(tier=tier).model_dump(mode="json"),
    }  # fmt: skip
    return Pool("dit", "render", RendererArgs(), status="RUNNING", running=running, info={**info, **fields})


PLANNER = Pool(
    "lm", "plan", PlannerArgs(), status="RUNNING", running=1, info={**(renderer().info or {}), "capacity": 4}
)


def row(name: str, role: str, state: str = "queued", *, due: float = 0.0, **fields: Any) -> Row:
    stage = ("planning" if role == "plan" else "rendering") if state == "running" else "queued"
    pools = ("lm", "dit") if role == "plan" else (None, "dit")
    return Row(name, "", state, stage, *pools, 1.0, 4.0, role == "render", due, **fields)


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

    async def describe() -> dict[str, Any]:
        asked.append(replicas[0])
        return {"model": replicas[0]}

    def details() -> dict[str, Any]:
        running = [{"state": "RUNNING", "replica_id": r, "node_id": "n", "actor_name": r} for r in replicas]
        return {"applications": {"dit": {"status": "RUNNING", "deployments": {"dit": {"replicas": running}}}}}

    watched = Fleet()
    monkeypatch.setattr(fleet_module, "_serve_details", details)
    monkeypatch.setattr(fleet_module, "_nodes", lambda: ((), frozenset()))
    handle = SimpleNamespace(describe=SimpleNamespace(remote=describe))
    monkeypatch.setattr(watched, "handle", lambda *_: handle)

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


# -- what a job finds


def found(
    view: FleetView, working: Sequence[Row] = (), place: Place | None = None, me: Waiting | None = None
) -> FleetState:
    return as_found_by(me, place or Place(), Routing().pools(view), working)


@pytest.mark.parametrize("seed", range(40))
def test_every_question_has_an_answer_however_pools_come_and_go_under_work(seed: int) -> None:
    """Nothing runs, nothing is known, nothing waits: each may be so while a replica is being replaced."""
    dice = random.Random(seed)
    routing, now = Routing(), time.time()
    rows: list[Row] = []
    for number in range(8):
        running = dice.choice([0, 0, 1, 3])
        known = dice.random() < 0.8
        pools = []
        for pool in (renderer(running=running), replace(PLANNER, running=dice.choice([0, 1, 2]))):
            args = dice.choice([pool.args, type(pool.args)(pool=pool.app, min_replicas=0, max_replicas=4)])
            size = dice.choice([pool.args, type(pool.args)(num_replicas=0), args])
            pools.append(replace(pool, args=size, info=pool.info if known else None, starting=dice.choice([0, 2])))
        fleet = FleetView(tuple(pools))
        backlog = Backlog(waiting_s=dice.choice([0.0, 3.0]), running_jobs=dice.choice([0, 9]))
        routing.backlogs = dict.fromkeys(dice.choice([("dit", "lm"), ("dit",), ()]), backlog)
        state, role = dice.choice(["queued", "running"]), dice.choice(["plan", "render"])
        places = (
            ((dice.choice(["dit#0", "dit#1", "lm#0", "gone"]), dice.choice([0.1, 1.0])),) if state == "running" else ()
        )
        rows.append(row(f"{role}{number}", role, state, places=places, stage_s=dice.choice([0.0, 2.0])))
        working = [r for r in rows if r.state == "running"]
        asked = SongRequest(prompt="x", duration=dice.choice([None, 30.0]), batch_size=dice.choice([1, 4]))
        job = Job("plan0", "song", "running", "queued", asked, now, plan_pool="lm", render_pool="dit")
        me = routing.newcomer(fleet, asked, "me")
        line = line_up([r for r in rows if r.state == "queued"], working, {}, now, newcomer=me)
        routing.admit(fleet, asked, me, line.places[""], working)
        for place in (Place(), line.places[""], line.behind):
            known_by = as_found_by(turn_of(job), place, routing.pools(fleet), working)
            for stage in ("queued", "planning", "planned", "rendering"):
                left = remaining_s(asked, known_by, planner="lm", renderer="dit", stage=stage)  # type: ignore[arg-type]
                assert left is None or 0.0 <= left < math.inf
            with contextlib.suppress(NoPool):
                routing.choose(fleet, job, place, working)


def test_a_renderer_is_free_when_all_that_was_sent_there_is_done_and_what_is_planned_comes_then() -> None:
    view = FleetView((renderer(running=2), PLANNER))
    working = [
        row("a", "render", "running", places=(("dit#0", 1.0),), stage_s=30.0, ran_s=29.95),
        row("b", "render", "running", places=(("dit#0", 1.0),), stage_s=10.0),
        row("c", "plan", "running", places=(("lm#0", 0.5),), stage_s=20.0, due=50.0),
    ]
    dit, lm = found(view, working).pools
    assert (dit.free_in_s, dit.busy) == ((13.0, 0.0), 1)  # an overdue song still takes a tenth of its time
    assert lm.free_in_s == (20.0, 20.0, 0.0, 0.0)
    late, early = (found(view, working, me=Waiting("d", "", 3.0, at)).pools[0].coming for at in (99.0, 1.0))
    assert (late, early) == (((20.0, 4.0, True),), ((20.0, 4.0, False),))


def test_a_job_in_the_line_waits_for_what_is_before_it() -> None:
    place = Place(3, {"lm": 4.0, "dit": 30.0}, {("lm", "dit"): (20.0, 2)})
    dit, lm = found(FleetView((renderer(running=2), PLANNER)), place=place).pools
    assert (dit.waiting_s, lm.waiting_s) == (30.0, 4.0)
    assert [work for _, work, _ in dit.coming] == [10.0, 10.0]


def test_growth_is_foreseen_only_where_the_pool_scales() -> None:
    grows = replace(renderer(), args=RendererArgs(pool="dit", min_replicas=0, max_replicas=4, drain_backlog_s=20))
    (state,) = Routing().pools(FleetView((grows,))).pools
    assert (state.drain_s, state.max_replicas, state.target) == (20.0, 4, 0)
    busy = Routing()
    busy.backlogs = {"dit": Backlog(waiting_s=50.0)}
    assert busy.pools(FleetView((grows,))).pools[0].target == 3
    assert Routing().pools(FleetView((renderer(),))).pools[0].drain_s is None


def test_replicas_that_start_are_there_as_soon_as_they_were_ordered_early() -> None:
    replicas = [{"replica_id": str(n), "state": "STARTING", "start_time_s": at} for n, at in enumerate((100.0, 103.0))]
    details = {"applications": {"dit": {"status": "RUNNING", "deployments": {"dit": {"replicas": replicas}}}}}
    (pool,) = parse_details(details).pools
    (state,) = (
        Routing().pools(FleetView((replace(renderer(), running=0, starting=2, ordered=pool.ordered),), at=105.0)).pools
    )
    assert (state.pending, state.pending_for_s) == (2, (5.0, 2.0))


# -- which replica


async def test_a_call_goes_to_the_replica_it_is_meant_for_while_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve offers a dead node's replicas until it has found out by itself."""
    router: Any = object.__new__(AsMeant)
    replicas: list[Any] = [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=name), node_id=f"n{name}") for name in "abc"
    ]
    asked: Any = SimpleNamespace(metadata=SimpleNamespace(request_id="call"), routing_context=SimpleNamespace())
    monkeypatch.setitem(sent.meant, "call", "b")
    assert await router.choose_replicas(replicas, asked) == [[replicas[1]], [replicas[0], replicas[2]]]
    monkeypatch.setattr(sent, "dead_nodes", {"nb"})
    assert await router.choose_replicas(replicas, asked) == [[replicas[0], replicas[2]]]
    assert await router.choose_replicas(replicas[1:2], asked) == []
    del sent.meant["call"]
    assert await router.choose_replicas(replicas, None) == [[replicas[0], replicas[2]]]


def test_replicas_of_a_dead_node_do_not_run() -> None:
    running = [{"state": "RUNNING", "replica_id": r, "node_id": f"n{r}"} for r in "ab"]
    details = {"applications": {"dit": {"status": "RUNNING", "deployments": {"dit": {"replicas": running}}}}}
    (pool,) = parse_details(details, {"na"}).pools
    assert (pool.running, pool.replicas) == (1, ("b",))


# -- what is learnt


def test_what_a_song_took_is_learnt_whatever_it_waited() -> None:
    routing, fleet = Routing(), FleetView((renderer(running=1),))
    request, plan = SongRequest(prompt="x", duration=60).with_seeds(), Plan(metadata=Metadata(duration=60))
    profile = find(tier="tier4")
    foretold = render_seconds(
        request, profile.renderer("turbo"), 60.0, model="acestep-v15-turbo", output_s=profile.output_s
    )
    item = SongItem(index=0, seed=1, duration=60.0, samples=60 * 48_000, files=())
    timings = RenderTimings(denoise_s=3 * foretold.wall_s, queued_s=900.0)
    song = Song(items=(item,), plan=plan, renderer="x", timings=timings)
    routing.learn_render(fleet, "dit", request, plan, song)
    assert routing.corrections.factor("dit", "render") == pytest.approx(3.0, rel=0.02)


def test_short_songs_share_a_renderer_that_takes_several() -> None:
    pool = Routing().pools(FleetView((renderer(running=1, together=4),))).pools[0]
    clip, song = (SongRequest(prompt="x", duration=d) for d in (10.0, 300.0))
    assert [share_of_renderer(pool, *asked) for asked in ((clip, 1), (clip, 4), (song, 1))] == [0.25, 0.5, 1.0]


# -- what is not known yet


def test_a_pool_that_never_told_what_it_can_do_does_not_switch_admission_off() -> None:
    """Its card may never come; meanwhile it counts as not there."""
    routing, line = Routing(), Place(1)
    silent = Pool("dit-new", "render", RendererArgs(), status="DEPLOYING")
    long = SongRequest(prompt="x", duration=600, thinking=False, use_cot_metas=False)

    def admit(request: SongRequest, *pools: Pool) -> Decision | None:
        view = FleetView(pools)
        return routing.admit(view, request, routing.newcomer(view, request, "me"), line, [])

    known = admit(long, renderer(), PLANNER)
    assert known is not None
    assert known.request.duration == 360
    assert admit(long, renderer(), PLANNER, silent) == known
    assert admit(long, silent, PLANNER) is None
    # Nobody knows whether it serves what nothing else does: that waits until it has said so.
    other = long.model_copy(update={"model": "acestep-v15-sft"})
    assert admit(other, renderer(), PLANNER, silent) is None
    with pytest.raises(InvalidRequest, match="serves acestep-v15-turbo, not"):
        admit(other, renderer(), PLANNER)
    # A planner that is still loading is waited for where there is no other, and only by who needs one.
    loading = Pool("lm-new", "plan", PlannerArgs(), status="DEPLOYING")
    thinking = SongRequest(prompt="x", duration=30)
    assert admit(thinking, renderer(), loading) is None
    assert admit(long, renderer(), loading) is not None
    assert admit(thinking, renderer(), loading, PLANNER) == admit(thinking, renderer(), PLANNER)
    off = replace(loading, info={"disabled": "ACESTEP_INIT_LLM=false"})
    decided = admit(thinking, renderer(), off)
    assert decided is not None
    assert decided.planner is None


def test_a_question_wakes_only_a_pool_that_sleeps() -> None:
    asleep = RendererArgs(pool="dit", tiers=("tier6",), min_replicas=0, max_replicas=2)
    cases = [
        (asleep, "RUNNING", [node("tier6")], True),
        (asleep, "RUNNING", [node("tier4")], False),
        (asleep.model_copy(update={"nodes_on_demand": True}), "RUNNING", [], True),
        (asleep, "DEPLOY_FAILED", [node("tier6")], False),
        (RendererArgs(tiers=("tier6",)), "RUNNING", [node("tier6")], False),
        (RendererArgs(tiers=("tier6",), num_replicas=1), "RUNNING", [node("tier6")], False),
    ]
    for args, status, nodes, wakes in cases:
        seen = view(args, *nodes, status=status)
        assert seen.wakes(seen.pools[0]) is wakes, (args, status)
