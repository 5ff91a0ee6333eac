"""Placement: what a chosen pool can do, when a larger card is worth it, what happens where none can."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acestep.errors import LimitExceeded
from acestep.gpu_config import TIERS
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from acestep.sizing import profiles
from deployments.scheduling.choose import FleetState, PoolState, Promise, choose, choose_pool, wait_s
from tests.fleet.conftest import make_pool


def song(**fields: object) -> SongRequest:
    return SongRequest.model_validate({"prompt": "folk", **fields})


def three_cards(**large: object) -> FleetState:
    """8 GB that plans and renders, 16 GB likewise, 80 GB that renders."""
    return FleetState(
        (
            make_pool("lm-8", "plan", "rtx-3060-ti-8", "tier4"),
            make_pool("dit-8", "render", "rtx-3060-ti-8", "tier4", shared=True),
            make_pool("dit-16", "render", "rtx-4060-ti-16", "tier6", shared=True),
            make_pool("dit-80", "render", "h100-sxm", "unlimited", **large),
        )
    )


GONE = {"running": 0, "reachable": False, "needs": "acestep/gpu-tier=unlimited"}


def test_long_batches_go_to_the_large_card_and_short_songs_to_the_small_one() -> None:
    fleet = FleetState(tuple(p for p in three_cards().pools if p.name != "dit-16"))
    large = choose(song(duration=300, batch_size=4), fleet)
    assert (large.outcome, large.planner, large.renderer) == ("run", "lm-8", "dit-80")
    assert "not dit-8 (at most 240 s x 2)" in large.reason
    short = choose(song(duration=30), fleet)
    assert (short.planner, short.renderer) == ("lm-8", "dit-8")
    assert "cheapest of 2 pools" in short.reason
    assert short.max_duration == 240


def test_when_the_large_card_goes_new_requests_are_cut_and_accepted_ones_wait() -> None:
    fleet, request = three_cards(**GONE), song(duration=600, batch_size=8)
    cut = choose(request, fleet)
    assert cut.outcome == "run"
    assert cut.renderer == "dit-16"
    assert [(a.field, a.asked, a.given) for a in cut.adjustments] == [("duration", 600, 480), ("batch_size", 8, 4)]
    assert (cut.request.duration, cut.request.batch_size) == (480, 4)

    waits = choose(request, fleet, clamp=False)
    assert (waits.outcome, waits.renderer, waits.eta_s) == ("wait", "dit-80", None)
    assert waits.request == request
    assert not waits.adjustments
    assert "acestep/gpu-tier=unlimited" in waits.reason

    back = choose(request, three_cards(), clamp=False)
    assert (back.outcome, back.renderer) == ("run", "dit-80")


def test_strict_requests_beyond_the_fleet_are_refused_by_name() -> None:
    with pytest.raises(LimitExceeded, match="duration 600 is above 480"):
        choose(song(duration=600, strict=True), three_cards(**GONE))


def test_a_plan_longer_than_what_is_left_of_the_fleet_is_cut_too() -> None:
    plan = Plan(metadata=Metadata(duration=600), codes=((1,) * 3000,))
    decision = choose(song(), three_cards(**GONE), plan=plan)
    assert decision.plan is not None
    assert decision.plan.codes is not None
    assert len(decision.plan.codes[0]) == 2400
    assert decision.request.plan is None
    assert decision.planner is None
    assert {a.field for a in decision.adjustments} == {"plan.metadata.duration", "plan.codes"}


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"task": "lego", "src_audio": "a.wav"}, "cannot do task lego"),
        ({"model": "acestep-v15-xl-base"}, "serves acestep-v15-turbo, not acestep-v15-xl-base"),
    ],
)
def test_what_nothing_can_ever_do_is_said(fields: dict[str, object], why: str) -> None:
    decision = choose(song(duration=30, **fields), three_cards())
    assert decision.outcome == "never"
    assert decision.renderer is None
    assert why in decision.reason


def test_a_fleet_without_planner_renders_without_thinking_and_says_so() -> None:
    fleet = FleetState(three_cards().of("render"))
    decision = choose(song(duration=60), fleet)
    assert decision.outcome == "run"
    assert decision.planner is None
    assert not decision.request.thinking
    assert decision.adjustments[0].field == "thinking"
    missing = FleetState((make_pool("lm-8", "plan", "rtx-3060-ti-8", "tier4", **GONE), *fleet.pools))
    assert choose(song(duration=60), missing, clamp=False).outcome == "wait"


def test_work_spills_to_a_larger_card_only_when_the_wait_is_worth_it() -> None:
    def with_waiting(seconds: float) -> str | None:
        pools = tuple(replace(p, free_in_s=(seconds,)) if p.name == "dit-8" else p for p in three_cards().pools)
        return choose(song(duration=30, thinking=False, use_cot_metas=False), FleetState(pools)).renderer

    assert with_waiting(0.5) == "dit-8"
    assert with_waiting(60) in ("dit-16", "dit-80")


def test_a_short_line_is_not_worth_a_machine_that_has_yet_to_come() -> None:
    """What measured times do to the estimate of a busy pool must not rent a large card, which would come too late."""

    def after(line_s: float, *, placeable: bool) -> str | None:
        asleep = {"running": 0, "max_replicas": 2, "placeable": placeable}
        pools = tuple(p for p in three_cards(**asleep).pools if p.name in ("dit-8", "dit-80"))
        busy = tuple(replace(p, waiting_s=line_s) if p.name == "dit-8" else p for p in pools)
        return choose(song(duration=30, thinking=False, use_cot_metas=False), FleetState(busy)).renderer

    assert [after(s, placeable=True) for s in (5, 60, 600)] == ["dit-8", "dit-80", "dit-80"]
    assert [after(s, placeable=False) for s in (5, 60, 600)] == ["dit-8", "dit-8", "dit-80"]


def test_a_pool_at_zero_is_started_when_the_running_one_is_crowded() -> None:
    quiet = three_cards(running=0, max_replicas=2)
    # Only the large card can: it is planned while that starts.
    assert choose(song(duration=500, thinking=False, use_cot_metas=False), quiet).outcome == "wait"
    assert choose(song(duration=500), quiet).renderer == "dit-80"
    crowded = FleetState(
        tuple(
            replace(p, running=0, max_replicas=4) if p.name == "dit-8" else replace(p, waiting_s=500.0)
            for p in quiet.pools
        )
    )
    decision = choose(song(duration=30, thinking=False, use_cot_metas=False), crowded)
    assert decision.outcome == "wait"
    assert "will start one" in decision.reason


def test_a_deadline_buys_a_larger_card_only_where_it_needs_one() -> None:
    request = song(duration=240, thinking=False, use_cot_metas=False)
    assert choose(request, three_cards(), deadline_in_s=600).renderer == "dit-8"
    assert choose(request, three_cards(), deadline_in_s=3).renderer == "dit-80"
    assert choose(request, three_cards(), deadline_in_s=0.001).renderer == "dit-80"  # nobody makes it: the fastest


def test_a_promise_is_kept_by_the_pool_that_was_foreseen_or_another() -> None:
    request = song(duration=30, thinking=False, use_cot_metas=False)
    assert choose(request, three_cards(), promise=Promise("dit-80", 10.0)).renderer == "dit-80"
    busy = FleetState(tuple(replace(p, waiting_s=200.0) if p.name == "dit-80" else p for p in three_cards().pools))
    assert choose(request, busy, promise=Promise("dit-80", 10.0)).renderer == "dit-8"


def test_a_batch_is_spread_where_that_is_faster_and_not_where_others_wait() -> None:
    four = FleetState((make_pool("dit", "render", "rtx-4090", "unlimited", running=4),))
    request = song(duration=240, batch_size=8, thinking=False, use_cot_metas=False)
    spread = choose(request, four)
    assert [len(g) for g in spread.groups] == [2, 2, 2, 2]
    alone = choose(request, FleetState((replace(four.pools[0], running=1),)))
    assert alone.groups == (tuple(range(8)),)
    assert alone.eta_s is not None
    assert spread.eta_s is not None
    assert spread.eta_s < 0.4 * alone.eta_s
    fast = FleetState((make_pool("dit", "render", "h100-sxm", "unlimited", running=4),))
    jingles = choose(song(duration=10, batch_size=4, thinking=False, use_cot_metas=False), fast)
    assert len(jingles.groups) == 1  # some milliseconds are not worth three more cards


def test_a_batch_waits_for_replicas_that_are_about_to_be_free_where_it_is_done_sooner_with_them_but_not_for_long() -> (
    None
):
    request = song(duration=240, batch_size=8, thinking=False, use_cot_metas=False)
    pool = make_pool("dit", "render", "rtx-3060-12", "unlimited", running=4, max_replicas=4)
    soon = choose(request, FleetState((replace(pool, free_in_s=(0.0, 3.0, 3.0, 3.0)),))).rendering
    assert soon is not None
    assert [len(g) for g in soon.groups] == [2, 2, 2, 2]
    assert soon.wait_s == 3.0
    assert soon.better_later(1, 0.0)
    assert not soon.better_later(4, 0.0), "they are free already"
    assert not soon.better_later(1, 31.0), "they may never be"
    late = choose(request, FleetState((replace(pool, free_in_s=(0.0, 900.0, 900.0, 900.0)),))).rendering
    assert late is not None
    assert (late.groups, late.wait_s) == ((tuple(range(8)),), 0.0)
    assert not late.better_later(1, 0.0)


def test_a_batch_waits_for_no_replica_that_nobody_has_ordered() -> None:
    request = song(duration=240, batch_size=8, thinking=False, use_cot_metas=False)
    pool = make_pool("dit", "render", "rtx-3060-12", "unlimited", max_replicas=4, drain_s=30.0)
    grows = choose(request, FleetState((pool,))).rendering
    assert grows is not None
    assert len(grows.groups) == 4
    assert grows.better_later(1, 0.0), "autoscaling has not seen it yet"
    assert not grows.better_later(1, 10.0)
    ordered = choose(request, FleetState((replace(pool, pending=3),))).rendering
    assert ordered is not None
    assert ordered.better_later(1, 10.0)


def test_what_is_on_its_way_comes_when_its_start_is_over() -> None:
    pool = make_pool("dit", "render", "rtx-3060-12", "tier5", running=0, pending=3, max_replicas=3)
    whole = pool.load_s
    assert pool.pending_s == (whole,) * 3
    assert wait_s(replace(pool, pending_for_s=(0.75 * whole, 0.5 * whole))) == pytest.approx(0.25 * whole)
    assert replace(pool, pending_for_s=(1.25 * whole, 40 * whole)).pending_s == pytest.approx(
        (0.25 * whole, whole, whole)
    )


def test_a_pool_that_scales_grows_for_the_work_itself() -> None:
    """Else a large batch that will be spread over replicas that start for it is foretold for one."""
    request = song(duration=240, batch_size=8, thinking=True)

    def eta(**fields: object) -> float:
        dit = make_pool("dit", "render", "rtx-3060-12", "unlimited", max_replicas=8, **fields)
        decision = choose(request, FleetState((make_pool("lm", "plan", "rtx-4080", "tier6"), dit)))
        assert decision.eta_s is not None
        return decision.eta_s

    assert eta(drain_s=30.0) < 0.5 * eta()
    waiting = {"drain_s": 1000.0, "waiting_s": 900.0}
    assert eta(**waiting, target=8) < 0.5 * eta(**waiting)


def test_coming_work_counts_only_if_its_plan_is_there_before_ours() -> None:
    def eta(*coming: tuple[float, float, bool]) -> float:
        lm, dit = make_pool("lm", "plan", "rtx-4090", "tier6"), make_pool("dit", "render", "rtx-4090", "unlimited")
        decision = choose(song(duration=60), FleetState((lm, replace(dit, coming=coming))))
        assert decision.eta_s is not None
        return decision.eta_s

    alone = eta()
    assert eta((0.5, 40.0, False)) > alone + 20  # it has the card when we come
    assert eta((900.0, 30.0, True)) == alone
    both_wait = ((0.1, 60.0, True), (1.0, 40.0, True)), ((0.1, 60.0, True), (1.0, 40.0, False))
    assert eta(*both_wait[0]) == pytest.approx(eta(*both_wait[1]) + 40.0)  # who goes first matters only if both wait


def test_planner_only_calls_take_a_planner_with_room() -> None:
    a, b = make_pool("a", "plan", "rtx-3060-12", "tier5"), make_pool("b", "plan", "rtx-4080", "tier6")
    assert choose_pool(FleetState((a, b)), "plan") is a
    assert choose_pool(FleetState((replace(a, waiting_s=100.0), b)), "plan") is b
    assert choose_pool(FleetState(()), "plan") is None


# -- properties

cards = st.sampled_from(sorted(set(profiles.cards()) - {"cpu"}))


@st.composite
def pools(draw: st.DrawFn, role: str) -> PoolState:
    running = draw(st.integers(0, 4))
    slots = 16 if role == "plan" else 1
    return make_pool(
        role, role, draw(cards), draw(st.sampled_from(TIERS)), shared=draw(st.booleans()),
        running=running, pending=draw(st.integers(0, 2)), max_replicas=draw(st.integers(1, 6)), reachable=draw(st.booleans()),
        free_in_s=tuple(draw(st.lists(st.floats(0, 500), max_size=running * slots))), waiting_s=draw(st.floats(0, 2000)),
        correction=draw(st.floats(0.2, 5)), drain_s=draw(st.sampled_from([None, 30.0])),
        coming=tuple(draw(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 60), st.booleans()), max_size=4))),
    )  # fmt: skip


fleets = st.builds(
    lambda plan, render: FleetState(tuple(replace(p, name=f"{p.role}-{i}") for i, p in enumerate((*plan, *render)))),
    st.lists(pools("plan"), max_size=3),
    st.lists(pools("render"), max_size=4),
)
requests = st.builds(
    song,
    duration=st.none() | st.floats(10, 600),
    batch_size=st.integers(1, 8),
    thinking=st.booleans(),
    lyrics=st.sampled_from(["", "la la la\n" * 50]),
)


@settings(max_examples=200, deadline=None)
@given(request=requests, fleet=fleets, clamp=st.booleans(), deadline=st.none() | st.floats(-10, 1000))
def test_a_chosen_pool_can_always_serve_the_request(
    request: SongRequest, fleet: FleetState, clamp: bool, deadline: float | None
) -> None:
    decision = choose(request, fleet, clamp=clamp, deadline_in_s=deadline)
    by_name = {p.name: p for p in fleet.pools}
    assert decision.reason
    if decision.outcome == "never":
        assert decision.renderer is None
        assert not any(
            p.limits.max_duration >= (request.duration or 0) and p.limits.max_batch >= request.batch_size
            for p in fleet.of("render")
        )  # fmt: skip
        return
    renderer = by_name[decision.renderer or ""]
    assert renderer.role == "render"
    assert (decision.request.duration or 0) <= renderer.limits.max_duration == decision.max_duration
    assert decision.request.batch_size <= renderer.limits.max_batch
    assert sorted(i for g in decision.groups for i in g) == list(range(decision.request.batch_size))
    chosen = [renderer]
    if decision.planner:
        chosen.insert(0, by_name[decision.planner])
        assert chosen[0].role == "plan"
        assert decision.est_plan_s > 0
    # What comes after the next stage may start meanwhile, where it can.
    assert (decision.outcome == "run") == bool(chosen[0].running and all(p.can_run for p in chosen))
    assert (decision.eta_s is None) == any(not p.can_run for p in chosen)
    if decision.eta_s is not None:
        begun = [option for option in (decision.planning, decision.rendering) if option is not None]
        assert decision.eta_s >= sum(option.seconds.wall_s for option in begun) > 0
    if clamp and any(p.can_run for p in fleet.of("render")):
        assert renderer.can_run
    if not clamp:
        assert decision.request.duration == request.duration
        assert decision.request.batch_size == request.batch_size
    assert choose(request, fleet, clamp=clamp, deadline_in_s=deadline) == decision  # a pure function


@settings(max_examples=150, deadline=None)
@given(pool=pools("render"), more=st.floats(0.1, 500))
def test_waits_grow_with_what_waits_and_shrink_with_replicas(pool: PoolState, more: float) -> None:
    pool = replace(pool, drain_s=None, max_replicas=1)  # no growth foreseen
    wait = wait_s(pool)
    assert 0 <= wait < float("inf")
    assert wait_s(replace(pool, waiting_s=pool.waiting_s + more)) >= wait - 1e-9
    assert wait_s(replace(pool, running=pool.running + 1)) <= wait + 1e-9


@settings(max_examples=100, deadline=None)
@given(request=requests, fleet=fleets, more=st.floats(0.1, 500))
def test_the_eta_of_the_only_pools_grows_with_their_queue(request: SongRequest, fleet: FleetState, more: float) -> None:
    plan = [replace(p, reachable=True, drain_s=None) for p in fleet.of("plan")[:1]]
    render = [replace(p, reachable=True, drain_s=None) for p in fleet.of("render")[:1]]
    if not render:
        return
    # One song: a batch may be spread over replicas that a longer queue makes free at the same time, and end earlier for it.
    request = request.model_copy(update={"batch_size": 1})
    before = choose(request, FleetState((*plan, *render)))
    longer = [replace(p, waiting_s=p.waiting_s + more) for p in (*plan, *render)]
    after = choose(request, FleetState(tuple(longer)))
    assert before.eta_s is not None
    assert after.eta_s is not None
    # A fuller planner is slower, so more of the renderer's queue may be gone when the plan is there; never more than that.
    assert after.eta_s >= before.eta_s - 1e-6


@settings(max_examples=100, deadline=None)
@given(request=requests, fleet=fleets)
def test_a_plan_alone_asks_nothing_of_renderers(request: SongRequest, fleet: FleetState) -> None:
    song, plan = choose(request, fleet), choose(request, fleet, only_plan=True)
    assert (plan.planner, plan.request, plan.max_duration) == (song.planner, song.request, song.max_duration)
    assert (plan.rendering, plan.renderer, plan.est_render_s) == (None, None, 0.0)
    if plan.planner:
        planner = next(p for p in fleet.pools if p.name == plan.planner)
        assert (plan.outcome == "run") == bool(planner.running)
        assert (plan.eta_s is None) == (not planner.can_run)
