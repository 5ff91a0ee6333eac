"""Which replica of a pool gets a call: the one that the dispatcher took a place on.

Serve's own choice compares two replicas picked at random. For requests of milliseconds that is enough; a song that is put behind another waits
for all of it while a third replica idles.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.fleet import sent

MAX_LEFT = 32


class AsMeant(RequestRouter):
    """A Serve request router, set by `request_router_config` of every pool. One lives in each handle."""

    def initialize_state(self, **_: Any) -> None:
        self._left: dict[str, RunningReplica] = {}  # of those that Serve sends nothing to any more, the last ones

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        stay = {r.replica_id for r in replicas}
        self._left |= {r.replica_id.unique_id: r for r in self.curr_replicas.values() if r.replica_id not in stay}
        self._left = dict(list(self._left.items())[-MAX_LEFT:])
        super().update_replicas(replicas)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """One that leaves works on what it has, and answers questions about that. Serve would wait for others, or ask them."""
        request_id = pending_request.metadata.request_id
        meant = self._left.get(sent.meant.get(request_id) or "")
        if (
            meant is not None
            and request_id in sent.to_the_last
            and not is_retry
            and meant.node_id not in sent.dead_nodes
        ):
            return meant
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replica that a call is meant for, then, where it is gone or full, any other whose node lives: of those Serve takes an idle one."""
        meant = None
        if pending_request is not None:
            # Else Serve asks again without a pause while all are full.
            pending_request.routing_context.should_backoff = True
            meant = sent.meant.get(pending_request.metadata.request_id)
        alive = [r for r in candidate_replicas if r.node_id not in sent.dead_nodes]
        first = [r for r in alive if r.replica_id.unique_id == meant]
        return [ranked for ranked in (first, [r for r in alive if r not in first]) if ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        super().on_request_routed(pending_request, replica_id, result)
        request_id, replica = pending_request.metadata.request_id, self.curr_replicas.get(replica_id)
        if replica and request_id in sent.meant:
            sent.nodes[request_id] = str(replica.node_id)
