"""How many jobs and requests a caller may have, counted by all routers together."""

from __future__ import annotations

import random
import threading
import time
import types

import pytest

from deployments.ingress.errors import retry_after
from deployments.jobs import limits as rates
from deployments.jobs.limits import Rates
from deployments.jobs.store import Busy, Caps, JobStore

from .test_store import add


def test_routers_count_requests_together(store: JobStore, database_url: str) -> None:
    other = JobStore(database_url)
    answers: list[float | None] = []
    both = [Rates(store.engine), Rates(other.engine)]
    threads = [threading.Thread(target=lambda r=r: answers.append(r.take("a", 5))) for r in both * 6]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waits = [wait for wait in answers if wait is not None]
    assert (len(answers), len(waits)) == (12, 7)
    assert all(wait > 0 for wait in waits)
    assert both[0].take("b", 5) is None
    other.close()


def test_a_minute_s_requests_come_back_one_by_one(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now, counted = time.time(), Rates(store.engine)
    monkeypatch.setattr(rates.time, "time", lambda: now)
    assert [counted.take("a", 2) for _ in range(3)] == [None, None, pytest.approx(30.0)]
    now += 29
    assert counted.take("a", 2) == pytest.approx(1.0)
    now += 1.001
    assert counted.take("a", 2) is None
    assert counted.take("a", 2) is not None
    now += 1_000
    assert [counted.take("a", 2) is None for _ in range(3)] == [True, True, False]  # no more than a minute's


def test_limits_hold_and_write_nothing(store: JobStore) -> None:
    add(store, owner_key="a", audio_s=50.0)
    with pytest.raises(Busy, match="1 jobs wait already; the limit is 1"):
        add(store, owner_key="a", caps=Caps(queued=1))
    with pytest.raises(Busy, match="under way"):
        add(store, owner_key="a", caps=Caps(active=1))
    add(store, owner_key="b", caps=Caps(active=1))
    with pytest.raises(Busy, match="24 hours") as error:
        add(store, owner_key="a", audio_s=11.0, caps=Caps(audio_s=60.0))
    assert 86_000 < error.value.details["retry_after"] <= 86_401
    add(store, owner_key="a", audio_s=10.0, caps=Caps(audio_s=60.0))
    assert store.counts()["queued"] == 3


def test_nobody_fills_the_queue_for_others(store: JobStore) -> None:
    full = Caps(queued=4)
    for owner, taken in (("a", 4), ("b", 2), ("c", 1)):  # of a full queue everybody may still take an equal share
        for _ in range(taken):
            add(store, owner_key=owner, caps=full)
        with pytest.raises(Busy, match="jobs wait already"):
            add(store, owner_key=owner, caps=full)
    with pytest.raises(Busy, match="7 jobs wait already, 2 of them this key's, whose share is 1; the limit is 4"):
        add(store, owner_key="b", caps=full)


def test_who_waits_as_long_as_told_has_room_again(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of a minute come one by one; audio of a day when as many of the oldest as it takes are a day old."""
    now, counted = time.time(), Rates(store.engine)
    clock = types.SimpleNamespace(time=lambda: now)
    monkeypatch.setattr(rates, "time", clock)
    monkeypatch.setattr("deployments.jobs.store.time", clock)
    draw = random.Random(1)
    for n in range(60):
        per_minute, told = draw.choice([1, 2, 3, 7, 11, 13, 30, 59, 60, 61, 100]), None
        while told is None:
            told = counted.take(f"caller{n}", per_minute)
            now += draw.random() / per_minute
        now += int(retry_after(told))  # what the header says, to the second
        assert counted.take(f"caller{n}", per_minute) is None
    caps = Caps(audio_s=100.0)
    for seconds in (10.0, 20.0, 30.0, 40.0):
        add(store, owner_key="a", audio_s=seconds, caps=caps)
        now += 1_000.0
    with pytest.raises(Busy) as refused:
        add(store, owner_key="a", audio_s=50.0, caps=caps)
    now += int(retry_after(refused.value.details["retry_after"]))
    add(store, owner_key="a", audio_s=50.0, caps=caps)
