"""The scaling decision, the policy as Ray Serve calls it, and the simulator's model of Serve."""

from __future__ import annotations

import asyncio
import logging
import random
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import cloudpickle
from ray.serve.autoscaling_policy import _apply_default_params, _apply_delay_logic
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from acestep.request import SongRequest
from deployments.capacity.scaling import Delays, ServeDelays
from deployments.jobs import waiting as backlog_module
from deployments.jobs.store import JobStore
from deployments.jobs.waiting import Backlog, Row, read_backlog, read_backlogs, summarise
from deployments.scheduling import autoscaling
from deployments.scheduling.autoscaling import BacklogPolicy, desired

POLICY = "deployments.scheduling.autoscaling:BacklogPolicy"

backlogs = st.builds(
    Backlog,
    waiting_s=st.floats(0, 1e6), running_s=st.floats(0, 1e6), upcoming_s=st.floats(0, 1e6), later_s=st.floats(0, 1e6),
    handover=st.floats(0, 1e6) | st.just(float("inf")), running_jobs=st.integers(0, 500), arrival=st.floats(0, 100),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(work=backlogs, low=st.integers(0, 5), more=st.integers(0, 50), drain=st.floats(1, 600), slots=st.integers(1, 16))
def test_desired_stays_within_bounds_and_grows_with_work(
    work: Backlog, low: int, more: int, drain: float, slots: int
) -> None:
    sizes = {"drain_s": drain, "min_replicas": low, "max_replicas": low + more, "slots": slots}
    wanted = desired(work, **sizes)  # type: ignore[arg-type]
    assert low <= wanted <= low + more
    busier = Backlog(**{**work.__dict__, "waiting_s": work.waiting_s + 100})
    assert desired(busier, **sizes) >= wanted  # type: ignore[arg-type]
    holding = min(low + more, -(-work.running_jobs // slots))
    assert wanted >= holding  # never below what holds running work


def test_from_zero_to_n_in_one_step_and_back_to_zero() -> None:
    assert desired(Backlog(waiting_s=290.0), drain_s=100, max_replicas=8) == 3
    assert desired(Backlog(waiting_s=0.1), drain_s=100, max_replicas=8) == 1
    assert desired(Backlog(), drain_s=100, max_replicas=8) == 0
    assert desired(Backlog(), drain_s=100, min_replicas=1, max_replicas=8) == 1
    assert desired(Backlog(waiting_s=1e9), drain_s=100, max_replicas=8) == 8


def test_renderers_are_not_started_for_what_the_planners_cannot_hand_over() -> None:
    """1,000 s of songs wait for a planner pool that is at its limit and hands over half a second of rendering per second."""
    behind = Backlog(upcoming_s=20.0, later_s=1000.0, handover=0.5)
    assert desired(behind, drain_s=30, max_replicas=100) == 2
    assert (
        desired(Backlog(later_s=1000.0), drain_s=30, max_replicas=100) == 34
    )  # planners are starting: both start at once


# -- the policy under Serve


def context(**fields: Any) -> SimpleNamespace:
    known = {
        "current_num_replicas": 0, "target_num_replicas": 2, "capacity_adjusted_min_replicas": 0,
        "capacity_adjusted_max_replicas": 5, "config": None, "policy_state": {}, "total_num_requests": 0.0,
    }  # fmt: skip
    return SimpleNamespace(**{**known, **fields})


def store_with(url: str, seconds: float, jobs: int = 3) -> JobStore:
    store = JobStore(url)
    for i in range(jobs):
        store.add(f"job{i}", SongRequest(prompt="x", duration=60), render_pool="dit", est_render_s=seconds)
    return store


def until_read(policy: BacklogPolicy, ctx: Any) -> int:
    deadline = time.monotonic() + 60
    while policy._read is None and time.monotonic() < deadline:
        policy(ctx)
        time.sleep(0.01)
    return policy(ctx)[0]


def test_the_policy_reads_the_store_and_scales(tmp_path: Any) -> None:
    store = store_with(url := f"sqlite:///{tmp_path}/jobs.db", 120.0)
    try:
        policy = BacklogPolicy(url, "dit", drain_s=100)
        policy._polled_at = float("inf")
        assert policy(context())[0] == 2  # nothing read yet: the size stays
        policy._polled_at = float("-inf")
        assert until_read(policy, context()) == 4
        assert until_read(BacklogPolicy(url, "other"), context()) == 0
    finally:
        store.close()


def test_a_store_that_cannot_be_read_keeps_the_size_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = BacklogPolicy("sqlite:////nonexistent/dir/jobs.db", "dit", poll_s=0.0)
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        try:
            for _ in range(50):
                assert policy(context(target_num_replicas=3)) == (3, {})
                time.sleep(0.005)
        finally:
            logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert len([r for r in set(caplog.records) if "cannot read the job store" in r.message]) == 1


def test_songs_in_one_batch_hold_their_replica_and_ask_for_no_other() -> None:
    policy = BacklogPolicy("sqlite:////nonexistent/jobs.db", "lm", drain_s=30)
    policy._read = (time.monotonic(), Backlog(running_s=10.0, running_jobs=16))
    assert policy(context(current_num_replicas=1))[0] == 1
    assert policy(context(current_num_replicas=3))[0] == 3
    assert policy(context(current_num_replicas=0))[0] == 1


def test_a_question_that_waits_keeps_a_pool_from_zero() -> None:
    policy = BacklogPolicy("sqlite:////nonexistent/jobs.db", "lm", drain_s=30)
    policy._read = (time.monotonic(), Backlog())
    assert policy(context(current_num_replicas=1, total_num_requests=1.0))[0] == 1
    assert policy(context(current_num_replicas=1, total_num_requests=0.01))[0] == 0  # a look at what it can do
    assert policy(context(total_num_requests=9.0, capacity_adjusted_max_replicas=0))[0] == 0


def test_a_stale_reading_keeps_the_size() -> None:
    policy = BacklogPolicy("sqlite:////nonexistent/jobs.db", "dit", stale_s=30)
    policy._read = (time.monotonic() - 31, Backlog(waiting_s=1e6))
    assert policy(context(target_num_replicas=1))[0] == 1
    policy._read = (time.monotonic() - 1, Backlog(waiting_s=1e6))
    assert policy(context(target_num_replicas=1))[0] == 5


def test_a_database_that_hangs_blocks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()
    calls = []

    def hang(url: str, pool: str) -> Backlog:
        calls.append(pool)
        release.wait(20)
        return Backlog()

    monkeypatch.setattr(backlog_module, "read_backlog", hang)
    policy = BacklogPolicy("sqlite://", "dit", poll_s=0.0)
    for _ in range(200):
        assert policy(context())[0] == 2
        time.sleep(0.001)
    release.set()
    assert len(calls) <= 1  # one waiting thread, not one per tick


class Exploding:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no " + name)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([None, 7, "x", Exploding(), object()])
    | st.builds(
        context,
        target_num_replicas=st.none() | st.floats(allow_nan=True) | st.text(max_size=3) | st.integers(),
        capacity_adjusted_max_replicas=st.none() | st.floats(allow_nan=True) | st.integers(-5, 5),
        capacity_adjusted_min_replicas=st.none() | st.text(max_size=3),
    ),
    st.sampled_from([None, Backlog(waiting_s=50.0), Backlog(waiting_s=float("nan")), "garbage"]),
)
def test_the_policy_never_raises(ctx: Any, read: Any) -> None:
    policy = BacklogPolicy("sqlite:////nonexistent/jobs.db", "dit", poll_s=1e9)
    policy._polled_at = time.monotonic()
    policy._read = None if read is None else (time.monotonic(), read)
    size, state = policy(ctx)
    assert isinstance(size, int)
    assert size >= 0
    assert state == {}


def test_serve_can_carry_the_policy_to_its_controller(tmp_path: Any) -> None:
    """By import path, kwargs as JSON, pickled by value, loaded where neither torch nor this module was imported."""
    kwargs = {"database_url": f"sqlite:///{tmp_path}/jobs.db", "pool": "dit", "drain_s": 30.0}
    config = AutoscalingConfig(
        min_replicas=0, max_replicas=4, policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs=kwargs)
    )
    path = tmp_path / "policy.pkl"
    path.write_bytes(cloudpickle.dumps((config.policy.get_serialized_policy_def(), kwargs)))
    code = (
        "import sys, types; from ray import cloudpickle\n"
        f"raw, kwargs = cloudpickle.loads(open({str(path)!r}, 'rb').read())\n"
        "policy = cloudpickle.loads(raw)(**kwargs)\n"
        "ctx = types.SimpleNamespace(target_num_replicas=2, capacity_adjusted_min_replicas=0, capacity_adjusted_max_replicas=4)\n"
        "print(policy(ctx)[0], 'torch' in sys.modules, 'deployments.scheduling.autoscaling' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["2", "False", "False"]


def test_through_serves_own_wrapper_zero_goes_to_n_at_once(tmp_path: Any) -> None:
    config = AutoscalingConfig(
        min_replicas=0, max_replicas=5, upscale_delay_s=60, policy=AutoscalingPolicy(policy_function=POLICY)
    )
    ctx = context(config=config, target_num_replicas=0)
    assert _apply_default_params(desired(Backlog(waiting_s=350), drain_s=100, max_replicas=5), ctx, {})[0] == 4


def test_the_policy_runs_on_an_event_loop_without_holding_it(tmp_path: Any) -> None:
    store = store_with(url := f"sqlite:///{tmp_path}/jobs.db", 120.0, jobs=300)

    async def ticks() -> int:
        policy = BacklogPolicy(url, "dit", drain_s=100, poll_s=0.0)
        for _ in range(400):
            policy(context())
            if policy._read is not None:
                break
            await asyncio.sleep(0.01)
        return policy(context())[0]

    try:
        assert asyncio.run(ticks()) == 5
    finally:
        store.close()


# -- the backlog


def test_the_backlog_follows_a_job_through_its_stages(tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    store = JobStore(url)
    try:
        store.add("j", SongRequest(prompt="x"), plan_pool="lm", render_pool="dit", est_plan_s=5.0, est_render_s=20.0)
        now = time.time()
        seen = read_backlogs(url, now)
        assert (seen["lm"].waiting_s, seen["dit"].later_s, seen["dit"].waiting_s) == (5.0, 20.0, 0.0)
        assert seen["dit"].arrival == pytest.approx(20.0 / 120)

        store.beat("me", 30)
        assert store.claim("j", "me", seconds=5.0) is not None
        seen = read_backlogs(url, now)
        assert (seen["lm"].waiting_s, seen["lm"].running_jobs, seen["dit"].upcoming_s, seen["dit"].later_s) == (
            0.0,
            1,
            20.0,
            0.0,
        )
        assert seen["dit"].handover == pytest.approx(4.0)

        from acestep.plan import Plan
        from deployments.jobs.schema import DatabaseNow, jobs

        store.save_plan("j", "me", Plan(), waits=True)
        seen = read_backlogs(url, now)
        assert "lm" not in seen or seen["lm"].running_s == 0
        assert (seen["dit"].waiting_s, seen["dit"].upcoming_s) == (20.0, 0.0)

        assert store.claim("j", "me", stage="rendering") is not None
        with store.engine.begin() as db:
            db.execute(jobs.update().values(stage_at=DatabaseNow() - 5.0))
        seen = read_backlogs(url, now)
        assert seen["dit"].running_jobs == 1
        assert 14.0 < seen["dit"].running_s <= 15.1

        store.succeed("j", "me")
        assert read_backlogs(url, now)["dit"].running_jobs == 0
        assert read_backlogs(url, now + 3600) == {}
    finally:
        store.close()


def test_one_query_serves_all_pools(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_with(url := f"sqlite:///{tmp_path}/jobs.db", 7.0)
    reads = []
    original = backlog_module.read_backlogs
    monkeypatch.setattr(backlog_module, "read_backlogs", lambda u: reads.append(u) or original(u))
    try:
        for pool in ("dit", "lm", "nothing"):
            read_backlog(url, pool)
        assert len(reads) == 1
        assert read_backlog(url, "dit").waiting_s == 21.0
    finally:
        store.close()


WAITS = Row(
    "j", "", "queued", "queued", "lm", "dit", est_plan_s=5.0, est_render_s=20.0, planned=False, created_at=1000.0
)


def test_songs_that_wait_for_planners_that_never_come_stop_counting() -> None:
    assert desired(summarise([WAITS], 1030.0)["dit"], drain_s=30, max_replicas=4) == 1
    old = summarise([WAITS], 1300.0)
    assert old["lm"].waiting_s == 5.0
    assert desired(old["dit"], drain_s=30, max_replicas=4) == 0


def test_a_burst_counts_whole_while_a_quick_planner_has_begun_with_one() -> None:
    """What a planner needs for a song is its estimate, until it proves to be slower."""
    waits = replace(WAITS, est_plan_s=0.1, est_render_s=1.0)
    begun = replace(waits, state="running", stage="planning", stage_s=0.1, ran_s=0.01)
    assert desired(summarise([begun, *[waits] * 5], 1000.0)["dit"], drain_s=1, max_replicas=8) == 6
    slow = replace(begun, ran_s=5.0)
    assert desired(summarise([slow, *[waits] * 5], 1000.0)["dit"], drain_s=1, max_replicas=8) == 2


def test_a_cancelled_job_is_no_arrival() -> None:
    row = replace(WAITS, state="cancelled", plan_pool=None, est_plan_s=0.0, est_render_s=200.0)
    assert summarise([row], 1001.0).get("dit", Backlog()).arrival == 0.0
    assert summarise([replace(row, state="succeeded")], 1001.0)["dit"].arrival > 1.0


# -- the simulator's model of Serve


@pytest.mark.parametrize("seed", range(20))
def test_the_simulated_serve_delays_as_serve_does(seed: int) -> None:
    rng = random.Random(seed)
    delays = Delays(up=rng.choice([0, 10, 30]), down=rng.choice([20, 60]), to_zero=rng.choice([20, 90]))
    config = AutoscalingConfig(
        min_replicas=0, max_replicas=9, upscale_delay_s=delays.up, downscale_delay_s=delays.down,
        downscale_to_zero_delay_s=delays.to_zero,
    )  # fmt: skip
    model, state, theirs, ours = ServeDelays(delays), {}, 3, 3
    wanted = 3
    for tick in range(300):
        now = 1000.0 + 2.0 * tick
        if rng.random() < 0.15:
            wanted = rng.randint(0, 6)
        theirs, state = _apply_delay_logic(wanted, theirs, config, state, _now=now)
        ours = model(now, wanted, running=1, target=ours)
        assert ours == theirs


def test_the_module_is_light() -> None:
    code = "import sys, deployments.scheduling.autoscaling; print(sorted({'torch', 'ray', 'sqlalchemy', 'pydantic'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
    assert autoscaling.BacklogPolicy.__module__ == POLICY.split(":")[0]
