"""What the choice of a replica (`deployments.fleet.replica_choice`) has to know and cannot learn from Serve, and where it sent what.

A module of its own because Serve copies the module of a request router by value: what it held in itself would be seen by nobody else.
"""

from __future__ import annotations

from collections.abc import Hashable, Set

_leaving: set[str] = set()
_nodes: dict[str, str] = {}  # of requests under way
_replicas: dict[str, Hashable] = {}  # the same
_shunned: dict[str, set[Hashable]] = {}  # by what came back from them
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


def sent(request_id: str, node: str, replica: Hashable = None) -> None:
    """A request went to that replica, on that node."""
    _nodes[request_id] = node
    _replicas[request_id] = replica


def answered(request_id: str) -> None:
    """Nothing more comes from where it was sent."""
    _nodes.pop(request_id, None)
    _replicas.pop(request_id, None)


def shun(work: str, request_id: str) -> None:
    """A replica could not do a piece of work (a job's id) that another may do: it is asked last for that."""
    if request_id in _replicas:
        _shunned.setdefault(work, set()).add(_replicas[request_id])


def pardon(work: str) -> None:
    """A piece of work is over."""
    _shunned.pop(work, None)


def shunned(work: object) -> Set[Hashable]:
    return _shunned.get(work, frozenset()) if isinstance(work, str) else frozenset()


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
