"""The router's side of the fleet: what pools can do before and after a replica said so, places, and what it learns from songs."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.request_router.common import ReplicaQueueLengthCache

from acestep.errors import InvalidRequest
from acestep.gpu_config import get_gpu_config, get_limits
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from acestep.sizing.cost import render_seconds
from acestep.sizing.profiles import find
from acestep.song import RenderTimings, Song, SongItem
from deployments.config.args import PlannerArgs, PoolArgs, RendererArgs
from deployments.config.build import build_config, parse_tiers
from deployments.fleet import busy
from deployments.fleet import watch as fleet_module
from deployments.fleet.replica_choice import LeastBusy, ranked
from deployments.fleet.watch import Fleet, FleetView, Node, Pool, parse_details
from deployments.ingress.native.health import readiness
from deployments.jobs.backlog import Backlog, handover_rate
from deployments.jobs.queue import Place as LinePlace
from deployments.jobs.queue import turn_of
from deployments.jobs.store import Job
from deployments.scheduling.choose import Decision, PoolState
from deployments.scheduling.eta import remaining_s
from deployments.scheduling.fairness import Waiting
from deployments.scheduling.ledger import NoPool, Routing
from deployments.scheduling.slots import Place
from deployments.scheduling.snapshot import pool_limits

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
    monkeypatch.setattr(fleet_module, "_nodes", lambda: ((), frozenset()))
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


def piece(name: str = "job", work_s: float = 1.0, *, submitted: float = 0.0, key: str = "", **fields: Any) -> Place:
    return Place(Waiting(name, key, work_s, submitted), work_s, work_s, **fields)


class Held:
    """Pieces that hold their places until told to go; `entered` says in which order they came in."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing
        self.entered: list[str] = []
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def add(self, *places: Place, pool: str = "dit") -> None:
        for place in places:
            self._tasks[place.turn.id] = asyncio.create_task(self._hold(place, pool))
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def end(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.wait({self._tasks[name]})
        await asyncio.sleep(0)

    async def _hold(self, place: Place, pool: str) -> None:
        async with self.routing.occupy(pool, "render", place):
            self.entered.append(place.turn.id)
            await asyncio.sleep(3600)


@pytest.fixture
async def held() -> AsyncIterator[Held]:
    held = Held(Routing())
    placed(held.routing)
    yield held
    for name in held._tasks:
        await held.end(name)


async def test_what_no_replica_can_begin_with_is_held_back_and_the_most_urgent_comes_next(held: Held) -> None:
    await held.add(piece("a"), piece("b"), piece("late", submitted=60.0), piece("early", submitted=10.0))
    assert held.entered == ["a", "b"]  # two replicas
    await held.end("a")
    assert held.entered[2:] == ["early"]
    await held.end("late")  # whoever gives up while it waits takes nothing along
    await held.end("b")
    await held.add(piece("c"))
    assert held.entered[3:] == ["c"]


async def test_a_caller_that_had_much_waits_behind_one_that_had_nothing(held: Held) -> None:
    held.routing.usage.add("many", 500.0, time.time())
    now = time.time()
    await held.add(
        piece("a"),
        piece("b"),
        *(piece(n, submitted=now - 9, key="many") for n in "cd"),
        piece("e", submitted=now, key="one"),
    )
    await held.end("a")
    assert held.entered[2:] == ["e"]


async def test_more_replicas_let_more_in(held: Held) -> None:
    await held.add(*(piece(n) for n in "abcd"))
    assert held.entered == ["a", "b"]
    held.routing.window(FleetView((renderer(running=3),)))
    await asyncio.sleep(0)
    assert held.entered == ["a", "b", "c"]


@pytest.mark.parametrize("seed", range(40))
async def test_every_question_has_an_answer_however_pools_come_and_go_under_work(seed: int) -> None:
    """Nothing runs, nothing is known, nothing waits: each may be so while a replica is being replaced."""
    dice = random.Random(seed)
    routing, held, now = Routing(), Held(Routing()), time.time()
    held.routing = routing
    for number in range(8):
        running = dice.choice([0, 0, 1, 3])
        known = dice.random() < 0.8
        pools = []
        for pool in (renderer(running=running), replace(PLANNER, running=dice.choice([0, 1, 2]))):
            args = dice.choice([pool.args, type(pool.args)(pool=pool.app, min_replicas=0, max_replicas=4)])
            size = dice.choice([pool.args, type(pool.args)(num_replicas=0), args])
            pools.append(replace(pool, args=size, info=pool.info if known else None, starting=dice.choice([0, 2])))
        fleet = FleetView(tuple(pools), routers=dice.choice([1, 2]))
        work_s = dice.choice([0.0, 2.0])
        pace = handover_rate(work_s, 1.0, dice.choice([0, 2]))
        backlog = Backlog(
            waiting_s=dice.choice([0.0, 3.0]), upcoming_s=work_s, handover=pace, running_jobs=dice.choice([0, 9])
        )
        routing.set_backlogs(dict.fromkeys(dice.choice([("dit", "lm"), ("dit",), ()]), backlog))
        for app in ("dit", "lm"):
            load = {"slots": dice.choice([1, 2, 9]), "then": ("dit", 1.0) if app == "lm" else None}
            await held.add(piece(f"{app}{number}", **load), pool=app)
        asked = SongRequest(prompt="x", duration=dice.choice([None, 30.0]), batch_size=dice.choice([1, 4]))
        job = Job(f"lm{number}", "song", "running", "queued", asked, now, plan_pool="lm", render_pool="dit")
        ahead = LinePlace(2, dice.choice([{}, {"lm": 3.0, "dit": 2.0}]), dice.choice([{}, {"dit": (1.0, 1)}]))
        assert routing.window(fleet) >= 2
        routing.admit(fleet, asked, routing.newcomer(fleet, asked, "me"), ahead)
        for line in (None, ahead):
            state = routing.state(fleet, turn_of(job), line=line)
            for stage in ("queued", "planning", "planned", "rendering"):
                left = remaining_s(asked, state, planner="lm", renderer="dit", stage=stage)  # type: ignore[arg-type]
                assert left is None or 0.0 <= left < math.inf
        with contextlib.suppress(NoPool):
            routing.choose(fleet, job, asked, None)
        for app in ("dit", "lm"):
            routing.whereabouts(f"{app}{number}")
        if number > 4:
            await held.end(dice.choice(sorted(held._tasks)))
    for name in held._tasks:
        await held.end(name)


async def test_a_device_that_is_free_gets_the_next_song_while_the_last_is_stored(held: Held) -> None:
    first = piece("a", call="request-a")
    await held.add(first, piece("b"), piece("c"))
    held.routing.leave("dit", first)
    await asyncio.sleep(0)
    assert held.entered == ["a", "b", "c"]
    assert busy.is_leaving("request-a")
    await held.end("a")
    assert not busy.is_leaving("request-a")
    await held.add(piece("d"))
    assert held.entered == ["a", "b", "c"]  # it left one place, not two


async def test_a_song_that_is_about_to_end_makes_room_but_one_that_is_overdue_draws_no_crowd(held: Held) -> None:
    await held.add(*(piece(n, 0.15) for n in "ab"), *(piece(n, 0.15) for n in "cdefgh"))
    assert held.entered == ["a", "b"]
    await asyncio.sleep(0.5)
    assert held.entered == ["a", "b", "c", "d", "e"]


async def test_short_songs_share_a_renderer_that_takes_several(held: Held) -> None:
    routing = held.routing
    routing.state(FleetView((renderer(running=1, together=4),)))
    clip, song = (SongRequest(prompt="x", duration=d) for d in (10.0, 300.0))
    assert (routing.share("dit", clip, 1), routing.share("dit", clip, 4), routing.share("dit", song, 1)) == (
        0.25,
        0.5,
        1.0,
    )
    await held.add(*(piece(n, share=0.25) for n in "abcd"), piece("e", share=0.25))
    assert held.entered == ["a", "b", "c", "d"]


async def test_where_a_job_is_and_what_is_left_of_that(held: Held) -> None:
    await held.add(piece("a", 30.0), piece("b", 10.0), piece("c", 7.0))
    where = held.routing.whereabouts
    assert where("a") == ("rendering", pytest.approx(30.0, abs=0.5))
    assert where("c") == ("planned", 0.0)
    assert where("elsewhere") is None


def placed(routing: Routing, me: Waiting | None = None) -> PoolState:
    return routing.state(FleetView((renderer(running=2),)), me).pools[0]


async def test_what_runs_here_is_known_to_the_moment_and_what_is_more_urgent_goes_before(held: Held) -> None:
    await held.add(piece("a", 30.0), piece("b", 10.0), piece("c", 7.0, submitted=100.0))
    both = placed(held.routing)
    assert both.free_in_s == pytest.approx((30.0, 10.0), abs=0.5)
    assert (both.busy, both.waiting_s) == (2, 7.0)
    assert placed(held.routing, piece("d", submitted=200.0).turn).waiting_s == 7.0
    before = placed(held.routing, piece("d", submitted=50.0).turn)
    assert (before.waiting_s, before.coming) == (0.0, ((0.0, 7.0, False),))
    itself = placed(held.routing, piece("c", submitted=100.0).turn)
    assert (itself.waiting_s, itself.coming) == (0.0, ())
    for name in "abc":
        await held.end(name)
    assert placed(held.routing).free_in_s == (0.0, 0.0)


async def test_what_is_being_planned_comes_when_it_is_planned() -> None:
    """The third waits for the rows of the first: it is planned after that one."""
    view = FleetView((renderer(), PLANNER))
    held = Held(Routing())
    held.routing.state(view)
    rows = {"slots": 2, "share": 0.5}
    for name, wall_s in (("a", 20.0), ("b", 30.0), ("c", 5.0)):
        place = Place(Waiting(name, "", 3.0, 50.0), 1.0, wall_s, then=("dit", wall_s / 10), **rows)
        await held.add(place, pool="lm")
    assert held.entered == ["a", "b"]
    late, early = (held.routing.state(view, Waiting("d", "", 3.0, at)).pools[0].coming for at in (99.0, 1.0))
    assert sorted(late) == [
        (pytest.approx(20.0, abs=0.5), 2.0, True), (pytest.approx(25.0, abs=0.5), 0.5, True), (pytest.approx(30.0, abs=0.5), 3.0, True)
    ]  # fmt: skip
    assert [first for _, _, first in early] == [False] * 3
    for name in "abc":
        await held.end(name)


def test_a_job_whose_turn_has_come_waits_for_what_others_do_and_one_in_the_queue_for_its_place() -> None:
    routing = Routing()
    view = FleetView((renderer(), PLANNER))
    backlog = Backlog(waiting_s=100.0, held_s=8.0, upcoming_s=20.0, later_s=300.0, running_jobs=1)
    routing.set_backlogs({"dit": backlog, "lm": Backlog(running_jobs=2)})
    turn, queued = (
        routing.state(view, piece("me").turn, line).pools[0] for line in (None, LinePlace(2, {"dit": 30.0}))
    )
    # Of other routers' songs: this one has none there. The place in the queue counts them itself.
    assert (turn.waiting_s, queued.waiting_s) == (8.0, 30.0)
    assert sum(work for _, work, _ in turn.coming) == pytest.approx(20.0)
    assert queued.coming == ()
    routing.set_backlogs({"dit": backlog})
    assert routing.state(view).pools[0].coming == ()


def test_a_job_in_the_queue_waits_for_its_place_alone() -> None:
    routing = Routing()
    routing.set_backlogs({"dit": Backlog(waiting_s=1_000.0)})
    line = LinePlace(3, {"lm": 4.0, "dit": 50.0}, {"dit": (20.0, 2)})
    (found,) = routing.state(FleetView((renderer(running=2),)), piece("me").turn, line).pools
    assert found.waiting_s == 30.0
    assert [work for _, work, _ in found.coming] == [10.0, 10.0]


def test_growth_is_foreseen_only_where_the_pool_scales() -> None:
    grows = replace(renderer(), args=RendererArgs(pool="dit", min_replicas=0, max_replicas=4, drain_backlog_s=20))
    (state,) = Routing().state(FleetView((grows,))).pools
    assert (state.drain_s, state.max_replicas, state.target) == (20.0, 4, 0)
    busy = Routing()
    busy.set_backlogs({"dit": Backlog(waiting_s=50.0)})
    assert busy.state(FleetView((grows,))).pools[0].target == 3
    assert placed(Routing()).drain_s is None


def test_the_least_busy_replica_comes_first() -> None:
    replicas: list[Any] = [SimpleNamespace(replica_id=name, node_id="n") for name in "abcd"]
    held: Any = {"a": 1, "b": 0, "c": 2, "d": 0}
    assert [[r.replica_id for r in rank] for rank in ranked(replicas, held)] == [["b", "d"], ["a"], ["c"]]
    assert ranked([], {}) == []


async def test_replicas_are_asked_for_their_queues_where_other_routers_send_songs_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(busy, "_leaving", {"request"})
    router = least_busy(Counter(a=1, b=1), {"internal": ("request", "b")})
    replicas: list[Any] = [SimpleNamespace(replica_id=name, node_id="n") for name in "abc"]
    for routers, known in ((1, [5, 5, 5]), (2, [5, None, None])):
        monkeypatch.setattr(busy, "routers", routers)
        router._promised = []
        for name in "abc":
            router._replica_queue_len_cache.update(name, 5)
        ranks = [[r.replica_id for r in rank] for rank in await router.choose_replicas(replicas)]
        assert [router._replica_queue_len_cache.get(name) for name in "abc"] == known
        if routers == 1:
            assert (sorted(ranks[0] + ranks[1]), ranks[2]) == (["b", "c"], ["a"])
        else:
            assert ranks[-1] == ["a"]


async def test_two_requests_at_once_do_not_choose_the_same_replica() -> None:
    router = least_busy(Counter(), {})
    replicas: list[Any] = [SimpleNamespace(replica_id=name, node_id="n") for name in "abc"]
    first = [(await router.choose_replicas(replicas))[0][0].replica_id for _ in range(3)]
    assert sorted(first) == ["a", "b", "c"]
    router.on_send_request("a")
    assert (router._held["a"], sorted(name for name, _ in router._promised)) == (1, ["b", "c"])
    router._promised = [(name, at - 1.0) for name, at in router._promised]  # they were given up
    assert {(await router.choose_replicas(replicas))[0][0].replica_id for _ in range(2)} == {"b", "c"}


async def test_nothing_is_sent_to_a_node_that_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve offers its replicas until it has found out by itself."""
    router = least_busy(Counter(), {})
    replicas: list[Any] = [SimpleNamespace(replica_id=name, node_id=f"n{name}") for name in "ab"]
    monkeypatch.setattr(busy, "dead_nodes", frozenset({"na"}))
    assert await router.choose_replicas(replicas) == [[replicas[1]]]
    assert await router.choose_replicas(replicas[:1]) == []


async def test_a_replica_that_could_not_do_a_job_is_asked_last_for_it() -> None:
    router = least_busy(Counter(b=3, c=3), {})
    replicas: list[Any] = [SimpleNamespace(replica_id=name, node_id="n") for name in "abc"]
    busy.sent("call", "n", "a")
    busy.shun("job", "call")
    busy.answered("call")
    for work, first in (("job", "bc"), ("other", "a")):
        asked: Any = SimpleNamespace(args=[work], routing_context=SimpleNamespace())
        ranks = [rank[0].replica_id for rank in await router.choose_replicas(replicas, asked)]
        assert (ranks[0] in first, sorted(ranks)) == (True, ["a", "b", "c"])
    busy.pardon("job")
    assert not busy.shunned("job")


def test_replicas_of_a_dead_node_do_not_run() -> None:
    running = [{"state": "RUNNING", "replica_id": r, "node_id": f"n{r}"} for r in "ab"]
    details = {"applications": {"dit": {"status": "RUNNING", "deployments": {"dit": {"replicas": running}}}}}
    (pool,) = parse_details(details, {"na"}).pools
    assert (pool.running, pool.replicas) == (1, ("b",))


def least_busy(held: Counter[str], routed: dict[str, tuple[str, str]]) -> Any:
    router: Any = object.__new__(LeastBusy)
    router._held, router._routed, router._promised = held, routed, []
    router._replica_queue_len_cache = ReplicaQueueLengthCache()
    router._use_replica_queue_len_cache = False
    return router


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
    share = routing.share("dit", SongRequest(prompt="x", duration=10), 1) if together > 1 else 1.0
    entered = [piece("a", share=share), piece("b", share=share)]
    async with routing.occupy("dit", "render", entered[0]) as first:
        if together > 1:
            async with routing.occupy("dit", "render", entered[1]) as second:
                pass
    if together == 1:
        async with routing.occupy("dit", "render", entered[1]) as second:
            pass
    assert first.alone == second.alone == (together == 1)
    routing.learn_render("dit", request, plan, song)
    assert routing.corrections.factor("dit", "render") == pytest.approx(3.0, rel=0.02)


# -- what is not known yet


def test_a_pool_that_never_told_what_it_can_do_does_not_switch_admission_off() -> None:
    """Its card may never come; meanwhile it counts as not there."""
    routing, line = Routing(), LinePlace(1)
    silent = Pool("dit-new", "render", RendererArgs(), status="DEPLOYING")
    long = SongRequest(prompt="x", duration=600, thinking=False, use_cot_metas=False)

    def admit(request: SongRequest, *pools: Pool) -> Decision | None:
        view = FleetView(pools)
        return routing.admit(view, request, routing.newcomer(view, request, "me"), line)

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
