"""Which replica each call under way is meant for, where it went, and which nodes died.

A module of its own because Serve copies the module of a request router by value: what it held in itself would be seen by nobody else.
"""

from __future__ import annotations

meant: dict[str, str | None] = {}  # replica by request, told before that is routed; None: any
to_the_last: set[str] = set()  # requests that are for the replica alone, and also while it leaves
nodes: dict[str, str] = {}  # Ray's id of the node that a request went to
dead_nodes: set[str] = set()  # Ray's ids: nothing is sent there, also before Serve knows
