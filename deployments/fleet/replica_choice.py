"""Which replica of a pool gets a piece of work: one that holds the fewest of ours.

Serve's own choice compares two replicas picked at random, from queue lengths that are up to ten seconds old. For requests of milliseconds
that is enough; a song that is put behind another waits for all of it while a third replica idles. Where other routers send songs, too, those
that hold as few of ours are asked for their queues, a few milliseconds.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import groupby
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.fleet import busy

LAST = 1_000_000  # pieces of work: more than a replica can hold
PROMISE_S = 0.2  # a choice that was not sent by then was given up


class LeastBusy(FIFOMixin, RequestRouter):
    """A Serve request router, set by `request_router_config` of every pool. One lives in each handle."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._held: Counter[ReplicaID] = Counter()
        self._routed: dict[str, tuple[str, ReplicaID]] = {}  # by internal id
        self._promised: list[tuple[ReplicaID, float]] = []  # chosen, with the time

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates whose nodes live, ranked by how much we have sent them that keeps them busy; equals in random order."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = (
                True  # else Serve asks again without a pause while all are full
            )
        alive = [r for r in candidate_replicas if r.node_id not in busy.dead_nodes]
        shuffled = random.sample(alive, len(alive))
        ending = Counter(replica for request, replica in self._routed.values() if busy.is_leaving(request))
        promised = self._promises()
        shunned = busy.shunned(pending_request.args[0]) if pending_request is not None and pending_request.args else ()
        load = {
            r: self._held[r] - ending[r] + promised[r] + LAST * (r in shunned) for r in (c.replica_id for c in shuffled)
        }
        ranks = ranked(shuffled, load)
        if busy.routers > 1:
            for replica in ranks[0] if ranks and len(ranks[0]) > 1 else ():
                # Forgotten, so that Serve asks them how much they have from other routers.
                self.replica_queue_len_cache.invalidate_key(replica.replica_id)
            return ranks
        if shuffled:  # two requests at once must not choose alike, and Serve tells only what was sent
            self._promised.append((ranks[0][0].replica_id, time.monotonic()))
        return [[replica] for rank in ranks for replica in rank]

    def _promises(self) -> Counter[ReplicaID]:
        """What was chosen a moment ago and is not sent yet."""
        since = time.monotonic() - PROMISE_S
        self._promised = [(replica, at) for replica, at in self._promised if at > since]
        return Counter(replica for replica, _ in self._promised)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._held[replica_id] += 1
        kept = next((promise for promise in self._promised if promise[0] == replica_id), None)
        if kept is not None:
            self._promised.remove(kept)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        super().on_request_routed(pending_request, replica_id, result)
        metadata = pending_request.metadata
        self._routed[metadata.internal_request_id] = (metadata.request_id, replica_id)
        if replica := self.curr_replicas.get(replica_id):
            busy.sent(metadata.request_id, str(replica.node_id), replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._over(internal_request_id)
        self._held[replica_id] -= 1
        if self._held[replica_id] <= 0:
            del self._held[replica_id]
            # A short call may be over before Serve says where it went.
            for late in [k for k, (_, at) in self._routed.items() if at == replica_id]:
                self._over(late)

    def _over(self, internal_request_id: str) -> None:
        if routed := self._routed.pop(internal_request_id, None):
            busy.answered(routed[0])


def ranked(replicas: list[RunningReplica], held: dict[ReplicaID, int]) -> list[list[RunningReplica]]:
    """Replicas in groups of equal load, the least loaded first; within a group as given."""

    def load(replica: RunningReplica) -> int:
        return held[replica.replica_id]

    return [list(group) for _, group in groupby(sorted(replicas, key=load), key=load)]
