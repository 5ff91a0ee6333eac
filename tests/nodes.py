"""Waits until the GCS of a cluster counts as many nodes as alive; a process of its own, with the cluster's environment:

    python tests/nodes.py GCS COUNT SECONDS [ADDRESS]

With an address, nodes of this address. Fails when the seconds are over.
"""

from __future__ import annotations

import socket
import sys
import time

from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RayError


def alive(gcs: str, address: str | None) -> int:
    host, _, port = gcs.rpartition(":")
    # A client of Ray's that comes too early tries again after many seconds.
    socket.create_connection((host, int(port)), timeout=5).close()
    nodes = GcsClient(address=gcs).get_all_node_info(timeout=5).values()
    return sum(n.state == GcsNodeInfo.ALIVE and address in (None, n.node_manager_address) for n in nodes)


def main(gcs: str, count: str, seconds: str, address: str | None = None) -> int:
    until = time.monotonic() + float(seconds)
    seen: int | str = "none"
    while time.monotonic() < until:
        try:
            seen = alive(gcs, address)
        except (OSError, RayError) as error:  # it does not answer yet
            seen = str(error)
        if seen == int(count):
            return 0
        time.sleep(0.3)
    print(f"{count} nodes expected; seen: {seen}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
