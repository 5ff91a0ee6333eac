"""Leases, final states, limits and idempotency, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from acestep.errors import Cancelled, OutOfMemory
from acestep.plan import Metadata, Plan
from acestep.request import SongRequest
from acestep.song import Progress, Song, SongItem
from deployments.jobs.job import Tries
from deployments.jobs.leases import asked
from deployments.jobs.store import Caps, IdempotencyConflict, Job, JobStore, LeaseLost
from deployments.jobs.uploads import FileRecords
from deployments.jobs.waiting import Row, read_usage, read_waiting, read_working

REQUEST = SongRequest(prompt="quiet piano", duration=10, seed=1)
SONG = Song(items=(SongItem(index=0, seed=1, duration=10.0, samples=480_000),), plan=Plan(), renderer="tiny")


def add(store: JobStore, **columns: object) -> Job:
    return store.add(str(uuid.uuid4()), REQUEST, **columns)[0]  # type: ignore[arg-type]


def existing(store: JobStore, job_id: str) -> Job:
    job = store.get(job_id)
    assert job is not None
    return job


def claim(store: JobStore, job_id: str, owner: str, lives_s: float = 30.0, **options: Any) -> Job | None:
    """As a router that lives for so long."""
    store.beat(owner, lives_s)
    return store.claim(job_id, owner, **options)


def fall_silent(store: JobStore, owner: str) -> None:
    """The time of a router is up, and it said nothing."""
    store.beat(owner, 0.0)


def test_a_job_goes_through_its_life_and_ends_once(store: JobStore) -> None:
    job = add(store)
    assert (job.state, [row.id for row in read_waiting(store.engine)]) == ("queued", [job.id])
    claimed = claim(store, job.id, "a", 10)
    assert claimed is not None
    assert claimed.attempts == 1
    assert claim(store, job.id, "b", 10) is None
    store.save_progress(job.id, "a", Progress(stage="planning", done=1, total=2))
    store.save_plan(job.id, "a", Plan(metadata=Metadata(bpm=90)))
    store.succeed(job.id, "a", SONG)
    done = existing(store, job.id)
    assert (done.state, done.result, done.plan.metadata.bpm) == ("succeeded", SONG, 90)  # type: ignore[union-attr]
    with pytest.raises(LeaseLost):
        store.fail(job.id, "a", OutOfMemory("no"))
    store.request_cancel(job.id)
    assert existing(store, job.id).state == "succeeded"
    assert [e.type for e in store.events_after(job.id, 0)] == ["queued", "started", "planned", "succeeded"]


def test_whoever_lost_the_lease_cannot_write(store: JobStore) -> None:
    job = add(store)
    claim(store, job.id, "a")
    fall_silent(store, "a")
    taken = claim(store, job.id, "b", 10)
    assert taken is not None
    assert taken.attempts == 2
    for write in (
        lambda: store.save_plan(job.id, "a", Plan()),
        lambda: store.save_progress(job.id, "a", Progress(stage="rendering")),
        lambda: store.succeed(job.id, "a", SONG),
        lambda: store.fail(job.id, "a", Cancelled("no")),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert existing(store, job.id).state == "running"
    store.succeed(job.id, "b", SONG)


@pytest.mark.parametrize("ahead_s", [-3600.0, 3600.0])
def test_a_router_lives_by_the_database_s_clock(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    """A router whose own clock is wrong takes no living job from another, and loses none."""
    job, original = add(store), time.time
    assert claim(store, job.id, "a", 10) is not None
    monkeypatch.setattr(time, "time", lambda: original() + ahead_s)
    assert claim(store, job.id, "b", 10) is None
    assert read_waiting(store.engine) == []
    assert [row.id for row in read_working(store.engine)] == [job.id]
    assert store.beat("a", 10).held == {job.id}
    fall_silent(store, "a")
    assert [waiting.id for waiting in read_waiting(store.engine)] == [job.id]
    assert read_waiting(store.engine, orphans=False) == read_working(store.engine) == []
    assert claim(store, job.id, "b", 10) is not None


def test_attempts_are_limited_and_neither_stages_nor_a_drain_cost_one(store: JobStore) -> None:
    job = add(store)
    for _ in range(5):
        assert claim(store, job.id, "a")
        store.release(job.id, "a", event="requeued")
    claim(store, job.id, "a")
    store.save_plan(job.id, "a", Plan(), waits=True)
    assert (existing(store, job.id).attempts, existing(store, job.id).stage) == (1, "planned")
    for attempt in range(1, 4):
        taken = claim(store, job.id, f"router {attempt}")
        assert taken is not None
        assert taken.attempts == attempt
        fall_silent(store, f"router {attempt}")
    assert claim(store, job.id, "b") is None
    ended = existing(store, job.id)
    assert ended.state == "failed"
    assert "3 attempts" in ended.error["message"]  # type: ignore[index]


def test_a_job_that_has_changed_since_it_was_looked_at_is_not_begun_by_what_was_seen(store: JobStore) -> None:
    """Two routers: while one decides, the other does the very stage."""
    stages: list[Callable[[Job], object]] = [
        lambda job: store.save_plan(job.id, "b", Plan(), waits=True),
        lambda job: store.release(job.id, "b", extra={"question": "answered"}),
        lambda job: store.release(job.id, "b", **asked(job.request.model_copy(update={"prompt": "better"}), ())),
    ]
    for stage in stages:
        seen = add(store)
        assert claim(store, seen.id, "b") is not None
        stage(seen)
        changed = existing(store, seen.id)
        assert store.claim(seen.id, "a", seen=seen, **asked(seen.request, ())) is None
        store.place(seen, {"est_render_s": 9.0, **asked(seen.request, ())})
        assert existing(store, seen.id) == changed
        store.place(changed, {"est_render_s": 9.0})
        assert store.claim(seen.id, "a", seen=existing(store, seen.id)) is not None


def test_a_pause_after_a_failure_is_kept_by_the_database_s_clock(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, original = add(store), time.time
    assert claim(store, job.id, "a")
    store.release(job.id, "a", pause_s=600.0, tries=Tries(failed=1, replicas=("r",), small=("dit",)))
    monkeypatch.setattr(time, "time", lambda: original() + 3600.0)
    (row,) = read_waiting(store.engine)
    assert row.paused
    assert store.claim(job.id, "b") is None
    with store.engine.begin() as db:
        db.exec_driver_sql("UPDATE jobs SET not_before = not_before - 600")  # that much later
    (row,) = read_waiting(store.engine)
    assert not row.paused
    assert existing(store, job.id).tries == Tries(1, 0, ["r"], ["dit"])
    assert claim(store, job.id, "b")


def test_only_so_much_is_claimed_as_fits_beside_what_works(store: JobStore, database_url: str) -> None:
    """Twenty routers want the two places of a replica at the same time."""
    ids, won = [add(store, render_pool="dit").id for _ in range(20)], []

    def fits(working: Sequence[Row]) -> bool:
        return sum(share for row in working for _, share in row.places) + 0.5 <= 1.0

    def begin(job_id: str) -> None:
        places = (("r", 0.5),)
        if claim(store, job_id, f"router of {job_id}", stage="rendering", places=places, seconds=9.0, fits=fits):
            won.append(job_id)

    threads = [threading.Thread(target=begin, args=(job_id,)) for job_id in ids]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 2
    working = read_working(store.engine)
    passed = time.monotonic() - began
    assert {(row.role, row.pool, row.places) for row in working} == {("render", "dit", (("r", 0.5),))}
    assert all(8.9 - passed < row.left_s <= 9.0 for row in working)
    store.free(won[0], f"router of {won[0]}", ())
    assert claim(store, next(i for i in ids if i not in won), "another", places=(("r", 0.5),), fits=fits)


def test_of_two_clusters_the_newer_takes_jobs_once_it_can_make_songs(store: JobStore) -> None:
    assert not store.beat("old", 30, cluster="one").outdated
    time.sleep(0.01)
    assert not store.beat("new", 30, cluster="two", serves=False).outdated
    assert not store.beat("old", 30, cluster="one").outdated
    store.beat("new", 30, cluster="two")
    assert store.beat("old", 30, cluster="one").outdated
    assert store.beat("a late router of the old cluster", 30, cluster="one").outdated
    assert not store.beat("new", 30, cluster="two").outdated
    store.leave("new")
    assert not store.beat("old", 30, cluster="one").outdated


def test_what_each_caller_had_lately_is_what_has_begun(store: JobStore) -> None:
    works = {"plan_pool": "lm", "render_pool": "dit", "est_plan_s": 2.0, "est_render_s": 5.0}
    planned, rendered, _ = (add(store, owner_key=key, **works) for key in ("a", "b", "c"))
    claim(store, planned.id, "r")
    claim(store, rendered.id, "r", stage="rendering")
    store.succeed(rendered.id, "r", SONG)
    assert {key: work_s for key, _, work_s in read_usage(store.engine)} == {"a": 2.0, "b": 7.0}


def test_cancelling_a_waiting_job_ends_it_and_a_running_one_is_told(store: JobStore) -> None:
    waiting, running = add(store), add(store)
    claim(store, running.id, "a", 10)
    assert store.request_cancel(waiting.id).state == "cancelled"  # type: ignore[union-attr]
    assert store.request_cancel(running.id).state == "running"  # type: ignore[union-attr]
    beat = store.beat("a", 10)
    assert beat.held == beat.cancelled == {running.id}
    assert store.beat("b", 10).held == set()
    store.fail(running.id, "a", Cancelled("cancelled by the caller"))
    assert existing(store, running.id).state == "cancelled"
    assert store.request_cancel("no such job") is None


def test_a_job_that_is_given_back_after_it_was_cancelled_ends(store: JobStore) -> None:
    job = add(store)
    claim(store, job.id, "a", 10)
    store.save_progress(job.id, "a", Progress(stage="planning"))
    store.request_cancel(job.id)
    store.release(job.id, "a")
    assert existing(store, job.id).state == "cancelled"
    assert [e.type for e in store.events_after(job.id, 0)][-1] == "cancelled"


def test_an_attempt_counts_its_own_time(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job, original = add(store), time.time
    first = claim(store, job.id, "a")
    fall_silent(store, "a")
    monkeypatch.setattr(time, "time", lambda: original() + 60.0)  # the server was down meanwhile
    second = claim(store, job.id, "b", 10)
    assert first is not None
    assert second is not None
    assert first.started_at is not None
    assert second.started_at is not None
    assert second.started_at >= first.started_at + 60.0


def test_ten_dispatchers_never_share_a_job(store: JobStore) -> None:
    ids = [add(store).id for _ in range(20)]
    won: list[str] = []

    def claim_all(owner: str) -> None:
        won.extend(job_id for job_id in ids if claim(store, job_id, owner, 30))

    threads = [threading.Thread(target=claim_all, args=(f"o{n}",)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == sorted(ids)


def test_idempotency_is_per_owner_and_per_body(store: JobStore) -> None:
    first, created = store.add("1", REQUEST, owner_key="a", idempotency_key="k", body_hash="h")
    assert created
    assert store.add("2", REQUEST, owner_key="a", idempotency_key="k", body_hash="h") == (first, False)
    assert store.add("3", REQUEST, owner_key="b", idempotency_key="k", body_hash="h")[1]
    with pytest.raises(IdempotencyConflict):
        store.add("4", REQUEST, owner_key="a", idempotency_key="k", body_hash="other")
    assert store.get("2") is None


def test_the_same_key_at_the_same_time_makes_one_job(store: JobStore) -> None:
    found: list[str] = []

    def submit() -> None:
        job, _ = store.add(str(uuid.uuid4()), REQUEST, idempotency_key="k", body_hash="h", caps=Caps(queued=1))
        found.append(job.id)

    threads = [threading.Thread(target=submit) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6  # nobody was told that the queue, with its one place, is full
    assert len(set(found)) == 1
    assert store.counts()["queued"] == 1


def test_paging_meets_every_job_once(store: JobStore) -> None:
    ids = [add(store, owner_key="a").id for _ in range(7)]
    add(store, owner_key="b")
    seen: list[str] = []
    before = None
    while page := store.page(owner_key="a", limit=3, before=before):
        seen += [job.id for job in page]
        before = (page[-1].created_at, page[-1].id)
    assert seen == ids[::-1]
    assert set(store.many([*ids, "none"])) == set(ids)
    assert store.page(states=("running",)) == []


def test_waiting_beyond_the_deadline_ends_a_job(store: JobStore) -> None:
    late, later, running = (
        add(store, deadline=time.time() - 1),
        add(store, deadline=time.time() + 60),
        add(store, deadline=1.0),
    )
    claim(store, running.id, "a", 10)
    assert store.expire() == 1
    assert [existing(store, j.id).state for j in (late, later, running)] == ["failed", "queued", "running"]
    assert existing(store, late.id).error["type"] == "deadline_exceeded"  # type: ignore[index]


def test_ids_that_no_database_can_hold_are_not_there(store: JobStore) -> None:
    assert store.get("a\x00b") is None
    assert store.many(["\ud800", "a\x00b"]) == {}
    assert FileRecords(store.engine).get("\x00") is None


def test_the_latest_of_many_jobs_at_once(store: JobStore) -> None:
    waiting, ended = add(store), add(store)
    store.request_cancel(ended.id)
    latest = store.latest([waiting.id, "none", ended.id])
    newest = {job.id: store.events_after(job.id, 0)[-1].seq for job in (waiting, ended)}
    assert latest == {
        waiting.id: (newest[waiting.id], False, None),
        "none": None,
        ended.id: (newest[ended.id], True, None),
    }
    assert store.latest([]) == {}


def test_how_far_a_stage_is_is_kept_once_however_often_it_was_said(store: JobStore) -> None:
    job = add(store)
    claim(store, job.id, "a", 10)
    for done in range(200):
        store.save_progress(job.id, "a", Progress(stage="rendering", done=done, total=200))
    assert [e.type for e in store.events_after(job.id, 0)] == ["queued", "started"]
    news = store.latest([job.id])[job.id]
    assert news is not None
    assert news.progress == Progress(stage="rendering", done=199, total=200).model_dump()
    assert existing(store, job.id).progress == Progress(stage="rendering", done=199, total=200)


def test_only_ended_jobs_are_forgotten(store: JobStore) -> None:
    ended, waiting = add(store), add(store)
    store.request_cancel(ended.id)
    assert store.ended_before(time.time() + 1) == [ended.id]
    assert not store.delete(waiting.id)
    assert store.delete(ended.id)
    assert store.get(ended.id) is None
    assert store.events_after(ended.id, 0) == []
    assert store.get(waiting.id) is not None
