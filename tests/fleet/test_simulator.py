"""The fleet simulator: nothing is lost, the clocks add up, and its headline results hold on a small day."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import fleet
from benchmarks.fleet_policies import RequestCount, RoundRobin
from deployments.capacity.pools import PoolSpec, Scaler
from deployments.capacity.scaling import SecondsOfWork
from deployments.capacity.simulator import Simulator
from deployments.capacity.traffic import Arrival, arrivals, request_of, shipped

ARRIVALS = fleet.day(200, hours=0.5)
SPECS = fleet.mixed_fleet(8)


@pytest.mark.parametrize("kind", [Simulator, RoundRobin])
def test_every_song_is_made_once_and_gpu_time_covers_the_work(kind: type[Simulator]) -> None:
    simulator = kind(SPECS, ARRIVALS, lambda pool: SecondsOfWork(pool, 30.0))
    result = simulator.run()
    assert len(result.songs) == len(ARRIVALS)
    assert all(s.finished is not None and s.finished > s.arrival.at for s in result.songs)
    assert 0 < sum(p.done_s for p in simulator.pools.values()) / 3600 < result.gpu_hours
    for pool in simulator.pools.values():
        assert not pool.queue
        assert not any(r.busy or r.rows for r in pool.replicas)
        assert len(pool.replicas) <= pool.spec.max_replicas


def test_the_same_day_twice_is_the_same() -> None:
    def finished() -> list[float | None]:
        return [s.finished for s in Simulator(SPECS, ARRIVALS, lambda pool: SecondsOfWork(pool, 30.0)).run().songs]

    assert finished() == finished()


def pools(planners: tuple[int, int], renderers: tuple[int, int]) -> list[PoolSpec]:
    (few, many), (least, most) = planners, renderers
    return [
        PoolSpec("lm", "plan", "rtx-3060-12", "tier5", fleet.LM, many, few, start_s=180.0),
        PoolSpec("dit", "render", "v100-16", "tier6", fleet.DIT, most, least, start_s=180.0),
    ]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_pool_that_may_grow_does_no_worse_than_its_smallest_size(seed: int) -> None:
    """Cards come after the burst that they were ordered for: what they were to be added to must be there still."""
    bursts = shipped()["songs"].model_copy(update={"jobs_per_hour": 150.0, "burst_share": 0.5})
    songs = arrivals(bursts, hours=2.0, seed=seed)

    def kept(planners: tuple[int, int], renderers: tuple[int, int]) -> float:
        return Simulator(pools(planners, renderers), songs, SecondsOfWork, bias=1.0).run().kept

    assert kept((1, 3), (3, 3)) >= kept((1, 1), (3, 3))
    assert kept((2, 2), (1, 3)) >= kept((2, 2), (1, 1))


def test_a_day_that_cannot_win_is_given_up() -> None:
    song = request_of(fleet.RERENDERS, 240.0, 1, 6)
    jobs = [Arrival(10.0 * n, song, "a", 240.0, 1.0, firm=True) for n in range(100)]  # no card makes that
    spec = [PoolSpec("dit", "render", "rtx-3060-12", "tier5", fleet.DIT, 1, 1, 0.1)]
    late = Simulator(spec, jobs, SecondsOfWork, until_s=3600.0, most_late=10).run()
    assert (late.whole, late.late) == (False, 11)
    dear = Simulator(spec, jobs, SecondsOfWork, until_s=3600.0, most_cost=0.09).run()
    assert not dear.whole, "the one card that is always on costs more by the end of the hour"
    assert len(dear.songs) <= 1, "which is known from the beginning"
    whole = Simulator(spec, jobs, SecondsOfWork, until_s=3600.0, most_late=100, most_cost=0.11).run()
    assert (whole.whole, whole.late) == (True, 100)
    assert whole.cost == pytest.approx(0.1)


def test_a_batch_does_not_wait_for_itself() -> None:
    """What it was told at submit is what it finds when its turn comes: it is in the line once."""
    song = request_of(fleet.RERENDERS, 180.0, 4, 6)
    spec = [PoolSpec("dit", "render", "rtx-3060-ti-8", "tier4", fleet.DIT, 2)]
    (made,) = Simulator(spec, [Arrival(0.0, song, "a", 180.0, 1e9)], None, bias=1.0, noise=0.0).run().songs
    assert len(made.decision.groups) == 2
    assert made.decision.wait_s == 0.0
    assert made.finished == pytest.approx(made.eta_s)


def test_a_pool_gives_back_what_does_not_serve_yet_before_what_does() -> None:
    """As Serve does: see `_get_replicas_to_stop` of its deployment scheduler."""
    wishes = iter([3, 3, 3, 1])
    orders: Scaler = lambda now, backlog, running, target, ongoing: next(wishes, 1)  # noqa: E731
    simulator = Simulator(pools((1, 1), (1, 3)), ARRIVALS[:20], lambda pool: orders, until_s=300.0)
    dit = simulator.run().pools[1]
    assert dit.sizes == [(0.0, 1)], "the one that served stayed, and the others never came"
    assert dit.gpu_s > simulator.now + 10.0, "they are paid for until they are given back"


def test_what_cannot_end_in_time_any_more_takes_no_card() -> None:
    song = request_of(fleet.RERENDERS, 240.0, 1, 6)
    spec = [PoolSpec("dit", "render", "rtx-3060-12", "tier5", fleet.DIT, 1)]
    alone = Simulator(spec, [Arrival(0.0, song, "a", 240.0, 1e9)], None, bias=1.0, noise=0.0).run().span_s
    # The card is twice as slow as its router knows: of ten that it takes at once most turn out to be too late.
    jobs = [Arrival(0.0, song, f"key{n}", 240.0, 6.5 * alone, firm=True) for n in range(10)]
    simulator = Simulator(spec, jobs, None, bias=1.0, noise=0.0)
    simulator.pools["dit"].bias = 2.0
    result = simulator.run()
    assert (sum(s.kept for s in result.songs), result.refused) == (3, 4)
    assert sum(s.stage == "late" for s in result.songs) == 3
    assert simulator.pools["dit"].done_s == pytest.approx(6 * alone), "three songs, and no second for the others"


def test_seconds_of_work_beat_request_counts_on_late_jobs_and_gpu_hours() -> None:
    arrivals = fleet.day(1_500, hours=4.0, seed=5)
    ours = Simulator(SPECS, arrivals, lambda pool: SecondsOfWork(pool, 20.0)).run()
    serve = Simulator(SPECS, arrivals, lambda pool: RequestCount(pool, 2, fleet.SERVE)).run()
    assert ours.late < serve.late
    assert ours.gpu_hours < 1.1 * serve.gpu_hours


def test_four_replicas_make_at_least_3_8_times_the_songs() -> None:
    assert fleet.replicas(200)["speedup"] >= 3.8


def test_routing_by_cost_is_later_less_often_than_dealing_out() -> None:
    result = fleet.routing(400, 2, hours=1.0)
    assert result["cost"]["late"] <= result["round_robin"]["late"]
    assert result["cost"]["p95_s"] < result["round_robin"]["p95_s"]


def test_table_plot_and_json_hold_every_row(tmp_path: Path) -> None:
    scaling = {
        "jobs": 1, "hours": 6.0, "cards": 2,
        "rows": [
            {"policy": p, "setting": s, "late": i, "gpu_hours": 10.0 * i, "price": 1.0, "p50_s": 1.0, "p95_s": 2.0, "p99_s": 3.0,
             "late_of_ours_at_this_gpu_hours": 0, "late_of_ours_at_this_price": None}
            for i, (p, s) in enumerate([("ours", "a"), ("ours", "b"), ("theirs", "c<d")], 1)
        ],
    }  # fmt: skip
    results = {
        "autoscaling": scaling, "replicas": {"songs_per_hour": {"1": 1}, "speedup": 4.0},
        "eta": {"fixed": {"all": {"p50": 0.1, "p90": 0.2}}},
        "plans": {"mixes": {}, "spot": {"jobs": 1, **{n: {"lost": 0, "redone": 0.0} for n in ("notice of 30 s", "no notice")}}},
        "routing": {"jobs": 1, "cards": 1, **{n: {"late": 0, "p50_s": 1, "p95_s": 1, "p99_s": 1, "price_of_busy_time": 1} for n in ("cost", "round_robin")}},
    }  # fmt: skip
    text = fleet.table(json.loads(json.dumps(results)))
    assert all(word in text for word in ("ours", "theirs", "4.0x", "p90 20.0%", "round_robin"))
    fleet.plot(scaling, tmp_path / "late.svg")
    drawn = (tmp_path / "late.svg").read_text()
    assert all(f"<!-- {word} -->" in drawn for word in ("ours", "theirs", "a", "b", "c&lt;d", "GPU hours"))
