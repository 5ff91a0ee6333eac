"""Serve requests that are at their end: they keep their replica from nothing any more.

A module of its own because Serve copies the module of a request router by value: what `deployments.least_busy` held in itself would be seen
by nobody else.
"""

from __future__ import annotations

_requests: set[str] = set()


def leaves(request_id: str) -> None:
    """Its replica can begin with the next."""
    _requests.add(request_id)


def forget(request_id: str) -> None:
    """It is over."""
    _requests.discard(request_id)


def is_leaving(request_id: str) -> bool:
    return request_id in _requests
