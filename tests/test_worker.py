"""The loop that both stages share: order, cancellation, deadlines, and failures that stay with their own."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from acestep.errors import Cancelled, DeadlineExceeded, Internal, InvalidRequest, Unavailable
from acestep.worker import MAX_FAILURES, EngineThread, Ticket


class Counting:
    """Counts each piece of work up to its number, one per step; one piece at a time."""

    def __init__(self) -> None:
        self.held: dict[Ticket[Any, Any], int] = {}
        self.order: list[Any] = []
        self.gate = threading.Event()
        self.gate.set()

    def has_room(self, ticket: Ticket[Any, Any]) -> bool:
        if ticket.work == "unreadable":
            raise TypeError("a defect")
        return not self.held

    def add(self, ticket: Ticket[Any, Any]) -> None:
        if ticket.work == "refused":
            raise InvalidRequest("refused", field="work")
        self.order.append(ticket.work)
        self.held[ticket] = 0

    def step(self) -> bool:
        self.gate.wait(60)
        for ticket in list(self.held):
            if ticket.work == "broken":
                raise RuntimeError("a device error")
            self.held[ticket] += 1
            if self.held[ticket] >= ticket.work:
                del self.held[ticket]
                ticket.finish(ticket.work)
        time.sleep(0.001)
        return True

    def remove(self, ticket: Ticket[Any, Any]) -> None:
        self.held.pop(ticket, None)

    def reset(self) -> None:
        self.held.clear()

    def stats(self) -> dict[str, Any]:
        return {"held": len(self.held)}


@pytest.fixture
def engine() -> Any:
    thread: EngineThread[Any, Any] = EngineThread(Counting(), name="test", max_queue=8)
    yield thread
    thread.close()


def test_lower_priority_numbers_go_first_and_ties_by_arrival(engine: EngineThread[Any, Any]) -> None:
    engine.engine.gate.clear()
    first = engine.submit(1)
    while not engine.engine.order:
        time.sleep(0.001)
    rest = [engine.submit(n, priority=p) for n, p in ((2, 1.0), (3, 0.0), (4, 0.0))]
    engine.engine.gate.set()
    assert [t.result(60) for t in (first, *rest)] == [1, 2, 3, 4]
    assert engine.engine.order == [1, 3, 4, 2]


def test_cancelled_and_late_work_frees_its_place(engine: EngineThread[Any, Any]) -> None:
    endless = engine.submit(10**9)
    waiting = engine.submit(5)
    late = engine.submit(5, deadline=time.monotonic() - 1)
    with pytest.raises(DeadlineExceeded):
        late.result(60)
    engine.cancel(endless)
    with pytest.raises(Cancelled):
        endless.result(60)
    assert waiting.result(60) == 5
    engine.close()  # the loop's last round has run
    assert engine.stats()["running"] == 0


def test_work_that_cannot_even_be_looked_at_fails_alone(engine: EngineThread[Any, Any]) -> None:
    running = engine.submit(300)
    bad = [engine.submit("unreadable") for _ in range(MAX_FAILURES)]
    for ticket in bad:
        with pytest.raises(Internal, match="TypeError"):
            ticket.result(60)
    assert engine.submit(1).result(60) == 1
    assert running.result(60) == 300
    assert engine.alive


def test_a_cancelled_future_does_not_leave_work_behind(engine: EngineThread[Any, Any]) -> None:
    endless = engine.submit(10**9)
    while not engine.engine.order:
        time.sleep(0.001)
    assert not endless.future.cancel()  # as a cancelled asyncio task does; the work is dropped by `cancel`
    assert engine.stats() | {"held": 1, "running": 1} == engine.stats()
    engine.cancel(endless)
    assert engine.submit(1).result(60) == 1


def test_a_refusal_is_its_own_and_a_failed_step_ends_what_ran(engine: EngineThread[Any, Any]) -> None:
    with pytest.raises(InvalidRequest):
        engine.submit("refused").result(60)
    with pytest.raises(Internal, match="RuntimeError"):
        engine.submit("broken").result(60)
    assert engine.submit(2).result(60) == 2
    assert engine.alive


def test_an_engine_whose_every_step_fails_is_not_alive(engine: EngineThread[Any, Any]) -> None:
    for _ in range(MAX_FAILURES):
        assert engine.alive
        with pytest.raises(Internal):
            engine.submit("broken").result(60)
    assert not engine.alive


def test_a_full_queue_and_a_closed_engine_refuse(engine: EngineThread[Any, Any]) -> None:
    running = engine.submit(10**9)
    while not engine.engine.order:
        time.sleep(0.001)
    waiting = [engine.submit(1) for _ in range(8)]
    with pytest.raises(Unavailable, match="8 pieces"):
        engine.submit(1)
    engine.close()
    for ticket in (running, *waiting):
        with pytest.raises(Cancelled):
            ticket.result(60)
    with pytest.raises(Unavailable):
        engine.submit(1)
