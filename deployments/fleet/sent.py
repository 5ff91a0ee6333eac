"""Which replica each call under way is meant for, where it went, and which nodes died.

A module of its own because Serve copies the module of a request router by value: what it held in itself would be seen by nobody else.
"""

from __future__ import annotations

_meant: dict[str, str] = {}  # replica by request
_nodes: dict[str, str] = {}  # node by request
dead_nodes: frozenset[str] = frozenset()  # Ray's ids


def aim(request_id: str, replica: str | None) -> None:
    """Say which replica a request is meant for, before it is routed; None: any."""
    _meant[request_id] = replica or ""


def meant_for(request_id: str) -> str | None:
    return _meant.get(request_id)


def went(request_id: str, node: str) -> None:
    """A request went to a replica on that node."""
    if request_id in _meant:
        _nodes[request_id] = node


def over(request_id: str) -> None:
    """Nobody waits for a request any more."""
    _meant.pop(request_id, None)
    _nodes.pop(request_id, None)


def node_of(request_id: str) -> str | None:
    """Ray's id of the node that a request went to; None before it is sent and after it is over."""
    return _nodes.get(request_id)


def set_dead_nodes(nodes: frozenset[str]) -> None:
    """Say which nodes died: nothing is sent there, also before Serve knows."""
    global dead_nodes
    dead_nodes = nodes
