"""Order of service: fair between callers, urgent first within a share, nobody forgotten."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.scheduling.fairness import FORGIVEN, SLACK_S, Usage, Waiting, next_jobs, place

NOW = 1_000_000.0


def job(id: str, key: str = "a", work: float = 10.0, age: float = 0.0, **fields: float) -> Waiting:
    return Waiting(id, key, work, NOW - age, **fields)


def test_one_caller_with_a_thousand_jobs_does_not_hold_up_another() -> None:
    flood = [job(f"flood{i}", "flood", age=100.0) for i in range(1000)]
    order = next_jobs([*flood, job("one", "other")], {}, NOW, 10)
    position = [j.id for j in order].index("one")
    assert position * 10.0 <= SLACK_S + 10.0
    # Once the flood has had its share of the fleet, the other caller goes first.
    assert next_jobs([*flood, job("one", "other")], {"flood": 100.0}, NOW, 1)[0].id == "one"


def test_the_more_urgent_job_goes_first_within_the_slack_and_not_beyond() -> None:
    relaxed, urgent = job("relaxed", "a", age=10.0), job("urgent", "b", deadline=NOW + 5)
    assert [j.id for j in next_jobs([relaxed, urgent], {}, NOW)] == ["urgent", "relaxed"]
    assert [j.id for j in next_jobs([relaxed, urgent], {"b": SLACK_S + 1}, NOW)] == ["relaxed", "urgent"]


def test_short_work_is_due_before_long_work_but_age_wins() -> None:
    long, short = job("long", work=100.0), job("short", work=2.0)
    assert next_jobs([long, short], {}, NOW)[0].id == "short"
    assert next_jobs([job("long", work=100.0, age=500.0), short], {}, NOW)[0].id == "long"


def test_priority_shifts_urgency_by_minutes() -> None:
    assert next_jobs([job("normal", age=30.0), job("raised", priority=-1.0)], {}, NOW)[0].id == "raised"
    assert next_jobs([job("normal", age=90.0), job("raised", priority=-1.0)], {}, NOW)[0].id == "normal"


def test_weights_share_in_proportion() -> None:
    jobs = [job(f"{key}{i}", key, weight=w) for key, w in (("a", 1.0), ("b", 3.0)) for i in range(200)]
    first = next_jobs(jobs, {}, NOW, 80)
    assert abs(sum(j.key == "b" for j in first) - 60) <= 9


def test_place_tells_position_and_what_goes_before() -> None:
    jobs = [job("x", age=3.0), job("y", age=2.0, work=5.0), job("z", age=-100.0)]
    order = [j.id for j in next_jobs(jobs, {}, NOW)]
    ahead = 0.0
    for position, id in enumerate(order, 1):
        assert place(id, jobs, {}, NOW) == (position, ahead)
        ahead += next(j.work_s for j in jobs if j.id == id)
    assert place("gone", jobs, {}, NOW) is None


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
    order = next_jobs(jobs, usage, NOW)
    assert sorted(j.id for j in order) == sorted(j.id for j in jobs)
    assert next_jobs(jobs, usage, NOW, 3) == order[:3]
    # Nobody is served who is further ahead than the slack of somebody that waits.
    had = dict(usage)
    for i, served in enumerate(order):
        forgiven = FORGIVEN * max(0.0, NOW - served.due)
        for other in {j.key for j in order[i:]} - {served.key}:
            assert had.get(served.key, 0.0) - forgiven <= had.get(other, 0.0) + SLACK_S + 1e-6
        had[served.key] = had.get(served.key, 0.0) + served.work_s


def test_no_caller_starves_whatever_the_others_keep_sending() -> None:
    """The victim has used far more than the others, who never stop; its job is served all the same."""
    usage = Usage()
    usage.add("victim", 5_000.0, NOW)
    victim = Waiting("victim", "victim", 10.0, NOW)
    now = NOW
    for i in range(2_000):
        rivals = [Waiting(f"r{i}-{k}", f"rival{i}-{k}", 10.0, now, deadline=now + 1) for k in range(3)]
        served = next_jobs([victim, *rivals], usage.at(now), now, 1)[0]
        if served.id == "victim":
            assert now - NOW < 3600
            return
        now += 10.0
    raise AssertionError("the victim was never served")


def test_even_usage_that_never_fades_is_outwaited() -> None:
    victim = Waiting("victim", "victim", 10.0, NOW)
    rival = Waiting("rival", "rival", 10.0, NOW + 40_000, deadline=NOW + 40_001)
    assert next_jobs([victim, rival], {"victim": 1_500.0}, NOW, 1)[0].id == "rival"
    assert next_jobs([victim, rival], {"victim": 1_500.0}, NOW + 40_000, 1)[0].id == "victim"


def test_usage_is_forgotten_by_half_lives() -> None:
    usage = Usage(half_life_s=100.0)
    usage.add("a", 80.0, NOW)
    assert usage.at(NOW + 100)["a"] == 40.0
    usage.add("a", 10.0, NOW + 100)
    assert usage.at(NOW + 200)["a"] == 25.0
    assert usage.at(NOW + 10_000) == {}
