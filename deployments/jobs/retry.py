"""What is worth another try, where, and how often: one table for the stages, the file store, the job store and the start.

what failed                                    tried again                      policy
a replica that was lost, or `ELSEWHERE`        by another one, three in all     STAGE, ASK
the job store does not answer (`UNREACHABLE`)  here, for as long as it matters  STORE
the file store does not answer                 here, then by another replica    FILES
either, or the model hub, while we start       here                             START
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from acestep.errors import AceStepError

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

# Types of errors that a replica met and another one may not: `acestep.errors`. All others are the song's own and would be met again.
ELSEWHERE = frozenset({
    "unavailable",  # it leaves, its queue is full, its file store does not answer
    "device_unavailable",
    "out_of_memory",
    "storage_permission",  # of that machine
    "cancelled",  # by the replica, that stops; where the caller cancelled nobody listens any more
})  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """How often, and after which pauses.

    Attributes:
        first_s: Pause before the second try; each pause is `growth` times the one before, up to `most_s`.
        for_s: Seconds after which no further try begins; None: no limit.
    """

    first_s: float
    growth: float = 2.0
    most_s: float = 5.0
    for_s: float | None = None

    def pause_s(self, tried: int) -> float:
        """Seconds between try number `tried`, from 1, and the next."""
        return min(self.most_s, self.first_s * self.growth ** min(tried - 1, 32))

    def pauses(self) -> Iterator[float]:
        """One pause for each further try. Time counts from the first `next`."""
        began = time.monotonic()
        for tried in itertools.count(1):
            if self.for_s is not None and time.monotonic() - began >= self.for_s:
                return
            yield self.pause_s(tried)


# A song that takes its process down must not take one replica after the other within seconds: the second pause outlasts a restart.
STAGE = Policy(first_s=1.0, growth=15.0, most_s=15.0)
ASK = Policy(first_s=1.0)  # somebody looks at a screen meanwhile
TRIES = 3  # of a stage, and of a question
STORE = Policy(first_s=0.1, most_s=2.0)
FILES = Policy(first_s=0.5, for_s=60.0)
START = Policy(first_s=0.5, most_s=15.0, for_s=300.0)  # then Serve shows why, and starts us anew


async def written(write: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call the job store in a thread, again and again until it answers.

    Whoever waits is cancelled where that makes no sense any more; a job that was taken over meanwhile is a `LeaseLost`, so late is not wrong.
    """
    from deployments.jobs.store import UNREACHABLE  # the stages import this module, and need no SQL

    for pause in STORE.pauses():
        try:
            return await asyncio.to_thread(write, *args, **kwargs)
        except UNREACHABLE as error:
            log.warning("the job store does not answer (%s); trying again", error.orig)
            await asyncio.sleep(pause)
    raise AssertionError("unreachable: there is no last try")


def patiently(
    policy: Policy,
    what: str,
    call: Callable[[], T],
    errors: tuple[type[Exception], ...] = (),
    given_up: Callable[[], bool] = lambda: False,
) -> T:
    """The result of a blocking call; tried again where its error says when (`retry_after`) or is one of `errors`. The last one is raised.

    Args:
        what: For the log: what is waited for.
        given_up: Whether nobody waits any more.
    """
    pauses = policy.pauses()
    while True:
        try:
            return call()
        except Exception as error:
            passes = isinstance(error, errors) or (isinstance(error, AceStepError) and "retry_after" in error.details)
            pause = next(pauses, None) if passes and not given_up() else None
            if pause is None:
                raise
            log.warning("%s: %s; trying again in %.1f s", what, getattr(error, "orig", None) or error, pause)
            time.sleep(pause)


def elsewhere(error: BaseException) -> bool:
    """Whether another replica may do what this one could not."""
    return isinstance(error, AceStepError) and error.type in ELSEWHERE
