"""Calls of the stages: a stream of messages, or one answer, from one replica; they end also where the replica's node falls silent.

They go by gRPC (Serve's inter-deployment transport) and on the router's own event loop: each message of Ray's actor streams costs milliseconds
more. Ray's actors notice by themselves that a node died; a gRPC stream to a machine that lost its power or its network stays open for
minutes. So the calls are ended here as soon as the cluster says that the node is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

from deployments.fleet import sent


class ReplicaGone(Exception):
    """The replica that worked on a call cannot be heard any more."""


class NotAccepted(ReplicaGone):
    """A call was taken back before any replica had accepted it: none has worked on it."""


REPLICA_LOST = (RayActorError, BackPressureError, DeploymentUnavailableError, ReplicaGone)


class Call:
    """One call under way.

    Attributes:
        response: Serve's; a stream of messages, or one answer.
        gone: Why it was ended here; None while it was not.
        answered: What comes yet is the end alone, and nobody waits for that.
    """

    def __init__(self, response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any]) -> None:
        self.id = str(response.request_id)
        self.response: Any = response
        self.gone: ReplicaGone | None = None
        self.answered = False

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """The messages of a stream, once."""
        async for message in self.response:
            self.answered = "progress" not in message
            yield message
            if self.answered:
                return


class Calls:
    """The stage calls under way. For one event loop.

    Args:
        by_grpc: False sends them as Ray's actor calls, on Ray's own ports.
    """

    def __init__(self, *, by_grpc: bool = True) -> None:
        self._by_grpc = by_grpc
        # An HTTP proxy of this machine is not meant for the cluster; Ray keeps its own channels off it, Serve forgets to.
        os.environ.setdefault("grpc_proxy", "")
        self._open: dict[str, Call] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def call(
        self, handle: DeploymentHandle[Any], method: str, *arguments: Any, replica: str | None = None
    ) -> AsyncIterator[Call]:
        """Call a streaming method of a pool. Leaving before its answer cancels the replica's work.

        Args:
            replica: Which replica is to do it, while it is there.

        Raises:
            ReplicaGone, and others of `REPLICA_LOST`: another replica may do the work.
        """
        streaming = handle.options(stream=True, _by_reference=not self._by_grpc)
        async with self._sent(getattr(streaming, method).remote(*arguments), replica) as call:
            try:
                yield call
            finally:
                if call.answered:
                    self._to_end(call.response)

    async def ask(self, handle: DeploymentHandle[Any], method: str, *arguments: Any, replica: str | None = None) -> Any:
        """The one answer of a method, as `call` gets a stream.

        Args:
            replica: Which replica is asked, also while it leaves.
        """
        unary = handle.options(_by_reference=not self._by_grpc)
        async with self._sent(
            getattr(unary, method).remote(*arguments), replica, to_the_last=replica is not None
        ) as call:
            answer = await call.response
            call.answered = True
        return answer

    @contextlib.asynccontextmanager
    async def _sent(
        self,
        response: DeploymentResponse[Any] | DeploymentResponseGenerator[Any],
        replica: str | None,
        *,
        to_the_last: bool = False,
    ) -> AsyncIterator[Call]:
        call = Call(response)
        sent.meant[call.id] = replica
        if to_the_last:
            sent.to_the_last.add(call.id)
        self._open[call.id] = call
        try:
            yield call
        except (asyncio.CancelledError, RequestCancelledError):
            if call.gone is None:
                raise
            raise call.gone from None
        except grpc.aio.AioRpcError as error:  # such as a stream that the replica broke off while it was stopped
            raise ReplicaGone(f"{error.code().name}: {error.details()}") from error
        finally:
            del self._open[call.id]
            del sent.meant[call.id]
            sent.to_the_last.discard(call.id)
            sent.nodes.pop(call.id, None)
            if not call.answered:
                call.response.cancel()

    def _to_end(self, stream: DeploymentResponseGenerator[Any]) -> None:
        """Read what is left of a stream: one that is dropped before its end is cancelled."""

        async def read() -> None:
            with contextlib.suppress(*REPLICA_LOST, grpc.aio.AioRpcError):
                async for _ in stream:
                    pass

        task = asyncio.create_task(read())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def end_on(self, nodes: frozenset[str]) -> None:
        """End the calls to these nodes, by Ray's node ids: they are dead. Nothing more is sent there.

        A call that no replica has accepted yet may have been sent to one that died just now: it is made again, too.
        """
        news = nodes - sent.dead_nodes
        sent.dead_nodes |= news
        for call_id, call in self._open.items():
            node = sent.nodes.get(call_id)
            if call.gone is None and (node in nodes or (node is None and news)):
                call.gone = ReplicaGone(f"node {node} died") if node else NotAccepted(f"node {min(news)} died")
                call.response.cancel()
