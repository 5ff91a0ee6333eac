"""Threads of the router, by what they wait for. `asyncio.to_thread`, the event loop's own pool, is for the job store: leases live there.

A file store or a name server that does not answer holds threads for as long as it likes; it must not hold those.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

STORE_THREADS = 32  # as many as the store has connections
P = ParamSpec("P")
T = TypeVar("T")
_files = ThreadPoolExecutor(16, "files")
# A look-up outlives the webhook's time limit, at most twice over, by the resolver's own: more threads than webhooks are sent at once.
_names = ThreadPoolExecutor(256, "names")


def store_pool() -> ThreadPoolExecutor:
    """For the event loop's default executor. By default it would have as few threads as there are cores."""
    return ThreadPoolExecutor(STORE_THREADS, "store")


async def with_files(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what reads or writes the file store, or decodes audio."""
    return await _run(_files, function, *args, **kwargs)


async def with_names(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a look-up of a host's addresses."""
    return await _run(_names, function, *args, **kwargs)


async def _run(pool: ThreadPoolExecutor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    context = contextvars.copy_context()  # as asyncio.to_thread does
    return await asyncio.get_running_loop().run_in_executor(pool, lambda: context.run(function, *args, **kwargs))
