"""Order of service: fair between callers, urgent first within a share, nobody forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.jobs.waiting import Row
from deployments.scheduling.fairness import FORGIVEN, SLACK_S, USAGE_HALF_LIFE_S, Waiting, next_jobs, usage_of
from deployments.scheduling.line import HANDOFF_S, Place, Room, line_up, next_room_s
from deployments.scheduling.pool import PoolState
from tests.fleet.conftest import make_pool

NOW = 1_000_000.0


def job(id: str, key: str = "a", work: float = 10.0, age: float = 0.0, **fields: float) -> Waiting:
    return Waiting(id, key, work, NOW - age, **fields)


def test_one_caller_with_a_thousand_jobs_does_not_hold_up_another() -> None:
    flood = [job(f"flood{i}", "flood", age=100.0) for i in range(1000)]
    order = list(next_jobs([*flood, job("one", "other")], {}, NOW))[:10]
    position = [j.id for j in order].index("one")
    assert position * 10.0 <= SLACK_S + 10.0
    # Once the flood has had its share of the fleet, the other caller goes first.
    assert next(next_jobs([*flood, job("one", "other")], {"flood": 100.0}, NOW)).id == "one"


def test_the_more_urgent_job_goes_first_within_the_slack_and_not_beyond() -> None:
    relaxed, urgent = job("relaxed", "a", age=10.0), job("urgent", "b", deadline=NOW + 5)
    assert [j.id for j in next_jobs([relaxed, urgent], {}, NOW)] == ["urgent", "relaxed"]
    assert [j.id for j in next_jobs([relaxed, urgent], {"b": SLACK_S + 1}, NOW)] == ["relaxed", "urgent"]


def test_short_work_is_due_before_long_work_but_age_wins() -> None:
    long, short = job("long", work=100.0), job("short", work=2.0)
    assert next(next_jobs([long, short], {}, NOW)).id == "short"
    assert next(next_jobs([job("long", work=100.0, age=500.0), short], {}, NOW)).id == "long"


def row(id: str, role: str, state: str = "queued", key: str = "a", due: float = 0.0, **fields: Any) -> Row:
    stage = {"queued": "queued", "running": "planning" if role == "plan" else "rendering"}[state]
    plan_pool = "lm" if role == "plan" else None
    return Row(id, key, state, stage, plan_pool, "dit", 2.0, 4.0, role == "render", NOW + due, **fields)


def test_places_and_what_goes_ahead_are_those_of_the_real_order() -> None:
    working = [row("rendering", "render", "running"), row("planning", "plan", "running", due=5.0)]
    many = [row(f"many{i}", "plan", key="many") for i in range(30)]
    waiting = [*many, row("planned", "render", key="one", due=-1.0), row("one", "plan", key="one", due=1.0)]
    line = line_up(waiting, working, {"many": 500.0}, NOW)
    # Who had much of the fleet lately waits behind who had nothing, though all of it came earlier.
    assert [r.id for r in line.waiting[:3]] == ["planned", "one", "many0"]
    assert [line.places[r.id].position for r in line.waiting] == list(range(1, 33))
    assert line.places["one"] == Place(2, {"dit": 4.0}, {})
    assert line.places["many1"].ahead == {"dit": 4.0, "lm": 4.0}
    assert line.places["many1"].later == {("lm", "dit"): (8.0, 2)}
    assert "rendering" not in line.places
    assert line.places["planning"].position == 0
    assert line.places["planning"].ahead["dit"] == 4.0  # what goes before it once it is planned
    assert line.behind.position == 33
    me = Waiting("", "new", 1.0, NOW)
    assert line_up(waiting, working, {"many": 500.0}, NOW, newcomer=me).places[""].position == 2  # due before "one"


def pool(role: Any, replicas: str, **fields: Any) -> PoolState:
    card = "rtx-3060-12"
    return make_pool("dit" if role == "render" else "lm", role, card, "tier5", replicas=tuple(replicas), **fields)


def test_a_renderer_takes_the_next_song_when_the_last_is_about_to_end_and_one_only() -> None:
    song = {"stage_s": 10.0, "places": (("a", 1.0),)}
    begun, ending, late = (row("x", "render", "running", ran_s=s, **song) for s in (1.0, 9.9, 30.0))
    for work, free in (([], "ab"), ([begun], "b"), ([ending], "ba"), ([late], "ba"), ([late, begun], "b")):
        assert "".join(Room(pool("render", "ab"), work).replicas(1.0)) == free, work
    assert Room(pool("render", "ab"), [begun]).fits((("b", 1.0),))
    assert not Room(pool("render", "ab"), [begun]).fits((("b", 1.0), ("a", 1.0)))
    assert Room(pool("render", "ab"), []).replicas(1.0, but="a") == ["b"]  # it failed there
    assert Room(pool("render", "a"), []).replicas(1.0, but="a") == ["a"]
    assert next_room_s([begun, late]) == pytest.approx(9.0 - HANDOFF_S)
    assert next_room_s([late]) is None


def test_rows_of_a_planner_are_taken_when_they_are_free() -> None:
    def plans(replica: str, share: float) -> Row:
        return row("x", "plan", "running", stage_s=1.0, ran_s=5.0, places=((replica, share),))

    room = Room(pool("plan", "ab"), [plans("a", 0.75), plans("b", 0.5), plans("gone", 1.0)])
    assert (room.replicas(0.25), room.replicas(0.5), room.replicas(0.75)) == (["b", "a"], ["b"], [])


jobs_of_callers = st.lists(
    st.tuples(st.sampled_from("abcd"), st.floats(0.1, 300), st.floats(0, 3000), st.none() | st.floats(-100, 3000)),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(jobs_of_callers, st.dictionaries(st.sampled_from("abcd"), st.floats(0, 5000)))
def test_every_job_comes_exactly_once_and_shares_stay_level(rows: list, usage: dict[str, float]) -> None:
    jobs = [
        job(str(i), key, work, age, **({} if deadline is None else {"deadline": NOW + deadline}))
        for i, (key, work, age, deadline) in enumerate(rows)
    ]
    order = list(next_jobs(jobs, usage, NOW))
    assert sorted(j.id for j in order) == sorted(j.id for j in jobs)
    # Nobody is served who is further ahead than the slack of somebody that waits.
    had = dict(usage)
    for i, served in enumerate(order):
        forgiven = FORGIVEN * max(0.0, NOW - served.due)
        for other in {j.key for j in order[i:]} - {served.key}:
            assert had.get(served.key, 0.0) - forgiven <= had.get(other, 0.0) + SLACK_S + 1e-6
        had[served.key] = had.get(served.key, 0.0) + served.work_s


def test_no_caller_starves_whatever_the_others_keep_sending() -> None:
    """The victim has used far more than the others, who never stop; its job is served all the same."""
    victim = Waiting("victim", "victim", 10.0, NOW)
    now = NOW
    for i in range(2_000):
        rivals = [Waiting(f"r{i}-{k}", f"rival{i}-{k}", 10.0, now, deadline=now + 1) for k in range(3)]
        served = next(next_jobs([victim, *rivals], usage_of([("victim", now - NOW, 5_000.0)]), now))
        if served.id == "victim":
            assert now - NOW < 3600
            return
        now += 10.0
    raise AssertionError("the victim was never served")


def test_even_usage_that_never_fades_is_outwaited() -> None:
    victim = Waiting("victim", "victim", 10.0, NOW)
    rival = Waiting("rival", "rival", 10.0, NOW + 40_000, deadline=NOW + 40_001)
    assert next(next_jobs([victim, rival], {"victim": 1_500.0}, NOW)).id == "rival"
    assert next(next_jobs([victim, rival], {"victim": 1_500.0}, NOW + 40_000)).id == "victim"


def test_usage_is_forgotten_by_half_lives() -> None:
    usage = usage_of([("a", USAGE_HALF_LIFE_S, 80.0), ("a", 0.0, 10.0), ("b", 2 * USAGE_HALF_LIFE_S, 80.0)])
    assert usage == {"a": 50.0, "b": 20.0}


def test_of_jobs_with_deadlines_the_earliest_goes_first_and_the_rest_gets_its_turn() -> None:
    late, soon, none = job("late", deadline=NOW + 600), job("soon", deadline=NOW + 60, age=-5.0), job("none")
    assert [j.id for j in next_jobs([late, none, soon], {}, NOW)] == ["soon", "none", "late"]
    # A caller who sends deadlines without end does not keep another's plain job waiting for ever.
    for second in range(0, 600, 5):
        urgent = job(f"u{second}", deadline=NOW + second + 5, age=-float(second))
        if next(iter(next_jobs([none, urgent], {}, NOW + second))).id == "none":
            break
    assert second <= 2 * 40.0 + 5


@pytest.mark.parametrize("work", [1.0, 10.0, 29.0])
def test_a_first_job_waits_for_no_more_of_another_s_work_than_it_is_itself(work: float) -> None:
    flood = [job(f"flood{i}", "flood", work, age=20.0) for i in range(1000)]
    order = [j.id for j in next_jobs([*flood, job("one", "other", work)], {}, NOW)]
    assert order.index("one") <= 1
