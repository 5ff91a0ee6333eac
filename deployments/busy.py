"""What the choice of a replica (`deployments.least_busy`) has to know and cannot learn from Serve.

A module of its own because Serve copies the module of a request router by value: what it held in itself would be seen by nobody else.
"""

from __future__ import annotations

_leaving: set[str] = set()
routers = 1  # that send work to the same replicas


def leaves(request_id: str) -> None:
    """A request is at its end: its replica can begin with the next."""
    _leaving.add(request_id)


def forget(request_id: str) -> None:
    """A request is over."""
    _leaving.discard(request_id)


def is_leaving(request_id: str) -> bool:
    return request_id in _leaving


def set_routers(number: int) -> None:
    """Say how many routers there are."""
    global routers
    routers = number
