"""Which replica of a pool gets a call: the one that the dispatcher took a place on.

Serve's own choice compares two replicas picked at random. For requests of milliseconds that is enough; a song that is put behind another waits
for all of it while a third replica idles.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.fleet import sent


class AsMeant(RequestRouter):
    """A Serve request router, set by `request_router_config` of every pool. One lives in each handle."""

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
