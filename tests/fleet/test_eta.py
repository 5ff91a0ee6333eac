"""The time that is left of a job, stage by stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from deployments.scheduling.choose import FleetState, PoolState, choose
from deployments.scheduling.eta import remaining_s
from deployments.scheduling.simulate import handed_over
from tests.fleet.conftest import make_pool

REQUEST = SongRequest(prompt="folk", duration=120)
PLAN = Plan(metadata=Metadata(duration=120), codes=((1,) * 600,))
POOLS = {"planner": "lm", "renderer": "dit"}


def planner(**fields: object) -> PoolState:
    return make_pool("lm", "plan", "rtx-4080", "tier6", **fields)


def fleet(**renderer: object) -> FleetState:
    return FleetState((planner(), make_pool("dit", "render", "rtx-3060-12", "tier5", **renderer)))


def test_at_submit_it_is_what_the_decision_said() -> None:
    for state in (fleet(), fleet(waiting_s=40.0, free_in_s=(5.0,))):
        assert remaining_s(REQUEST, state, stage="queued", **POOLS) == pytest.approx(choose(REQUEST, state).eta_s)


def test_it_falls_from_stage_to_stage() -> None:
    left = [
        remaining_s(REQUEST, fleet(), stage="queued", **POOLS),
        remaining_s(REQUEST, fleet(), stage="planning", left_s=2.0, **POOLS),
        remaining_s(REQUEST, fleet(), stage="planning", done=0.9, **POOLS),
        remaining_s(REQUEST, fleet(), stage="planned", plan=PLAN, **POOLS),
        remaining_s(REQUEST, fleet(), stage="rendering", plan=PLAN, left_s=0.5, **POOLS),
        remaining_s(REQUEST, fleet(), stage="rendering", plan=PLAN, done=0.99, **POOLS),
    ]
    assert all(x is not None and x > 0 for x in left)
    assert left == sorted(left, key=lambda x: -(x or 0.0))


def test_others_queues_do_not_touch_a_song_that_is_being_rendered() -> None:
    crowded = fleet(waiting_s=500.0)
    assert remaining_s(REQUEST, crowded, stage="rendering", plan=PLAN, **POOLS) == remaining_s(
        REQUEST, fleet(), stage="rendering", plan=PLAN, **POOLS
    )


def test_what_the_router_knows_of_a_running_stage_counts_and_progress_counts_more() -> None:
    told = [
        remaining_s(REQUEST, fleet(), stage="planning", **POOLS, **known)
        for known in ({"left_s": 100.0}, {"left_s": 1.0}, {"left_s": 100.0, "done": 1.0})
    ]
    assert told[0] == pytest.approx((told[1] or 0.0) + 99.0)
    assert told[2] == pytest.approx((told[1] or 0.0) - 1.0)


def test_without_the_card_there_is_no_answer() -> None:
    gone = fleet(running=0, reachable=False)
    assert remaining_s(REQUEST, gone, stage="queued", **POOLS) is None
    no_planner = FleetState(tuple(replace(p, running=0, reachable=p.role == "render") for p in fleet().pools))
    assert remaining_s(REQUEST, no_planner, stage="queued", **POOLS) is None
    assert remaining_s(REQUEST, fleet(), stage="planned", plan=PLAN, **POOLS) is not None


def test_who_needs_no_plan_does_not_wait_for_the_plans_of_others() -> None:
    others = fleet(coming=handed_over(100.0, 10, 60.0, 80.0))
    given = REQUEST.model_copy(update={"thinking": False, "use_cot_metas": False})
    alone = remaining_s(given, fleet(), stage="queued", planner=None, renderer="dit")
    assert remaining_s(given, others, stage="queued", planner=None, renderer="dit") == alone
    planned = remaining_s(
        REQUEST, replace(others, pools=(planner(waiting_s=70.0), others.pools[1])), stage="queued", **POOLS
    )
    assert planned is not None
    assert alone is not None
    assert planned > 160.0 > alone


def test_a_fleet_without_planner_tells_when_songs_are_done() -> None:
    """Such a song may lack tempo and key: there is nobody to ask, so it is rendered as it is."""
    state = FleetState(fleet().of("render"))
    decision = choose(REQUEST, state)
    assert (decision.planner, decision.request.thinking) == (None, False)
    told = remaining_s(decision.request, state, stage="queued", planner=None, renderer="dit")
    assert told == pytest.approx(decision.eta_s)
