"""The loop that both stages share: one thread owns the device, callers submit, cancel and wait.

An `Engine` holds the work in flight and advances all of it by one unit per `step()` (one decoder token, one denoising step, one
VAE tile). `EngineThread` feeds it from a queue ordered by (priority, arrival), drops what is cancelled or late between two steps, and
turns an engine failure into a failure of the tickets it held, never of the thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from acestep.errors import AceStepError, Cancelled, DeadlineExceeded, Internal, Unavailable
from acestep.song import Progress

log = logging.getLogger(__name__)
MAX_FAILURES = 5

W = TypeVar("W")
R = TypeVar("R")


class Ticket(Generic[W, R]):
    """One piece of submitted work.

    Attributes:
        work: What to do; owned by the engine once added.
        priority: Lower goes first. Ties go by arrival.
        deadline: `time.monotonic()` after which the work is dropped, or None.
        submitted, started: `time.monotonic()`.
    """

    def __init__(
        self,
        work: W,
        *,
        id: str | None = None,
        priority: float = 0.0,
        deadline: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        self.id = id or uuid.uuid4().hex
        self.work = work
        self.priority = priority
        self.deadline = deadline
        self.future: Future[R] = Future()
        self.future.set_running_or_notify_cancel()  # only `cancel` drops work: a future cancelled by itself would leave it in its place
        self.submitted = time.monotonic()
        self.started: float | None = None
        self._on_progress = on_progress
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask for the work to be dropped; it frees its place before the engine's next step."""
        self._cancelled.set()

    @property
    def queued_s(self) -> float:
        return (self.started if self.started is not None else time.monotonic()) - self.submitted

    def progress(self, progress: Progress) -> None:
        if self._on_progress is None:
            return
        try:
            self._on_progress(progress)
        except Exception:  # a listener's defect must not stop other callers' work
            log.exception("progress listener of %s failed", self.id)
            self._on_progress = None

    def finish(self, result: R) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def result(self, timeout: float | None = None) -> R:
        return self.future.result(timeout)


class Engine(Protocol[W, R]):
    """What a stage implements. All methods but `stats` run on the engine thread."""

    def has_room(self, ticket: Ticket[W, R]) -> bool:
        """Whether `add` would find a place now. Work that can never fit returns True here and is refused by `add`."""

    def add(self, ticket: Ticket[W, R]) -> None:
        """Take the work in. Raises `AceStepError` where it is refused."""

    def step(self) -> bool:
        """Advance everything in flight by one unit, finishing or failing tickets. False where nothing is in flight."""

    def remove(self, ticket: Ticket[W, R]) -> None:
        """Free the ticket's place; unknown tickets are ignored."""

    def reset(self) -> None:
        """Forget everything in flight after an unexpected failure."""

    def stats(self) -> dict[str, Any]:
        """Numbers for health and metrics. Called from other threads: read plain attributes only."""


class EngineThread(Generic[W, R]):
    """Runs an `Engine` on its own thread.

    Args:
        engine: The stage.
        name: Thread name, seen in `py-spy` and logs.
        max_queue: Tickets that may wait; beyond it `submit` raises `Unavailable`.
        begin: Called once on the thread, ahead of everything.
    """

    def __init__(
        self,
        engine: Engine[W, R],
        *,
        name: str,
        max_queue: int = 1024,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self.max_queue = max_queue
        self._queue: list[tuple[float, int, Ticket[W, R]]] = []
        self._order = itertools.count()
        self._wake = threading.Condition()
        self._closed = False
        self._begin = begin
        self._running: dict[str, Ticket[W, R]] = {}
        self._failures = 0  # in a row
        self.steps = 0
        self.busy_s = 0.0
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    # -- callers' side

    def submit(
        self,
        work: W,
        *,
        id: str | None = None,
        priority: float = 0.0,
        deadline: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Ticket[W, R]:
        ticket: Ticket[W, R] = Ticket(work, id=id, priority=priority, deadline=deadline, on_progress=on_progress)
        with self._wake:
            if self._closed:
                raise Unavailable("the engine is shutting down", retry_after=5)
            if len(self._queue) >= self.max_queue:
                raise Unavailable(f"{len(self._queue)} pieces of work already wait here", retry_after=5)
            heapq.heappush(self._queue, (priority, next(self._order), ticket))
            self._wake.notify()
        return ticket

    def cancel(self, ticket: Ticket[W, R]) -> None:
        ticket.cancel()
        with self._wake:
            self._wake.notify()

    @property
    def alive(self) -> bool:
        """Whether work given here will be done. False too once every step fails, as after a fatal device error: nothing but a new
        process helps then."""
        return self._thread.is_alive() and self._failures < MAX_FAILURES

    def stats(self) -> dict[str, Any]:
        return {
            "waiting": len(self._queue),
            "running": len(self._running),
            "steps": self.steps,
            "busy_s": self.busy_s,
            **self.engine.stats(),
        }

    def close(self, timeout: float = 10.0) -> None:
        """Stop after the step in progress; what is unfinished fails as cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)

    # -- engine thread

    def _loop(self) -> None:
        self._begin()
        while True:
            with self._wake:
                while not self._closed and not self._queue and not self._running:
                    self._wake.wait()
                if self._closed:
                    break
            try:
                self._sweep()
                self._admit()
                begin = time.monotonic()
                if self._running and self.engine.step():
                    self.steps += 1
                    self._failures = 0
                self.busy_s += time.monotonic() - begin
                self._collect()
                self._idle_while_blocked()
            except Exception as error:
                self._fail_all(error)
        for ticket in [*self._running.values(), *(t for _, _, t in self._queue)]:
            ticket.fail(Cancelled("the engine was shut down"))
        self._running.clear()
        self.engine.reset()

    def _drop_reason(self, ticket: Ticket[W, R]) -> AceStepError | None:
        if ticket.cancelled:
            return Cancelled("cancelled by the caller")
        if ticket.deadline is not None and time.monotonic() > ticket.deadline:
            return DeadlineExceeded("the deadline passed before the work was done")
        return None

    def _sweep(self) -> None:
        for ticket in list(self._running.values()):
            if reason := self._drop_reason(ticket):
                self.engine.remove(ticket)
                del self._running[ticket.id]
                ticket.fail(reason)
        with self._wake:
            keep = []
            for entry in self._queue:
                if reason := self._drop_reason(entry[2]):
                    entry[2].fail(reason)
                else:
                    keep.append(entry)
            if len(keep) < len(self._queue):
                heapq.heapify(keep)
                self._queue = keep

    def _admit(self) -> None:
        while True:
            with self._wake:
                if not self._queue:
                    return
                try:
                    if not self.engine.has_room(self._queue[0][2]):
                        return
                except Exception as error:  # the work's own defect, and asked again it would be raised again
                    log.exception("work was refused for a defect")
                    heapq.heappop(self._queue)[2].fail(_shown(error))
                    continue
                ticket = heapq.heappop(self._queue)[2]
                ticket.started = time.monotonic()
                self._running[ticket.id] = ticket
            try:
                self.engine.add(ticket)
            except AceStepError as error:
                del self._running[ticket.id]
                ticket.fail(error)

    def _collect(self) -> None:
        for ticket in [t for t in self._running.values() if t.future.done()]:
            del self._running[ticket.id]

    def _idle_while_blocked(self) -> None:
        # Nothing runs and the head of the queue has no room: wait for a change instead of spinning.
        with self._wake:
            if not self._running and self._queue and not self._closed and not self.engine.has_room(self._queue[0][2]):
                self._wake.wait(0.05)

    def _fail_all(self, error: Exception) -> None:
        log.exception("engine step failed; %d pieces of work are lost with it", len(self._running))
        self._failures += 1
        for ticket in self._running.values():
            ticket.fail(_shown(error))
        self._running.clear()
        try:
            self.engine.reset()
        except Exception:
            log.exception("engine reset failed")


def _shown(error: Exception) -> AceStepError:
    return error if isinstance(error, AceStepError) else Internal(f"the engine failed: {type(error).__name__}")
