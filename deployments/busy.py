"""What the choice of a replica (`deployments.least_busy`) has to know and cannot learn from Serve, and where it sent what.

A module of its own because Serve copies the module of a request router by value: what it held in itself would be seen by nobody else.
"""

from __future__ import annotations

_leaving: set[str] = set()
_nodes: dict[str, str] = {}  # of requests under way
dead_nodes: frozenset[str] = frozenset()  # Ray's ids
routers = 1  # that send work to the same replicas


def leaves(request_id: str) -> None:
    """A request is at its end: its replica can begin with the next."""
    _leaving.add(request_id)


def forget(request_id: str) -> None:
    """A request is over."""
    _leaving.discard(request_id)


def is_leaving(request_id: str) -> bool:
    return request_id in _leaving


def sent(request_id: str, node: str) -> None:
    """A request went to a replica on that node."""
    _nodes[request_id] = node


def answered(request_id: str) -> None:
    """Nothing more comes from where it was sent."""
    _nodes.pop(request_id, None)


def node_of(request_id: str) -> str | None:
    """Ray's id of the node that a request went to; None before it is sent and after it is over."""
    return _nodes.get(request_id)


def set_dead_nodes(nodes: frozenset[str]) -> None:
    """Say which nodes died: nothing is sent there, also before Serve knows."""
    global dead_nodes
    dead_nodes = nodes


def set_routers(number: int) -> None:
    """Say how many routers there are."""
    global routers
    routers = number
