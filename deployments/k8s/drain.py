"""`python -m deployments.k8s.drain SECONDS`, the preStop hook of worker pods: let this node's replicas finish their songs, elsewhere start new ones.

Ray is told that the node will be gone after SECONDS. Serve then starts replacements on other nodes, sends no new work here and lets each replica
work off what it has. The hook returns when none is left, or when the time is up; then Kubernetes ends the pod, and unfinished songs go on
elsewhere from what the job store knows. A router has no songs of its own: where its replacement finds no place but this one, it is not waited
for longer than open requests take.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterable

import psutil

log = logging.getLogger(__name__)

REPLICA_TITLE = "ray::ServeReplica"
ROUTER = "router"  # its deployment
ROUTER_S = 60.0
POLL_S = 1.0


def serving(processes: Iterable[psutil.Process]) -> list[str]:
    """The deployments of those of these processes that are Serve replicas."""
    found = []
    for process in processes:
        try:
            titles = [part for part in process.cmdline() if part.startswith(REPLICA_TITLE)]
        except psutil.Error:
            continue  # it ended while we looked
        found += [
            title.rpartition(":")[2].partition(".")[0] for title in titles
        ]  # ray::ServeReplica:APPLICATION:DEPLOYMENT.method
    return found


def drain(seconds: int, processes: Callable[[], Iterable[psutil.Process]] = psutil.process_iter) -> bool:
    """Drain this Ray node. True when its replicas have ended, False when time was up or Ray could not be told."""
    began = time.monotonic()
    command = [
        "ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod is being deleted",
        "--deadline-remaining-seconds", str(seconds),
    ]  # fmt: skip
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode != 0:
        # Nobody would take the work away, so waiting would only delay the pod.
        log.error("Ray refused to drain this node: %s", (told.stderr or told.stdout).strip()[-500:])
        return False
    while left := serving(processes()):
        waited = time.monotonic() - began
        if set(left) == {ROUTER} and waited >= ROUTER_S:
            log.info("the router's replacement has no place yet; another router takes its jobs over")
            return True
        if waited >= seconds:
            log.warning("%d replicas still work after %d s", len(left), seconds)
            return False
        time.sleep(POLL_S)
    return True


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.exit("usage: python -m deployments.k8s.drain SECONDS")
    sys.exit(0 if drain(int(sys.argv[1])) else 1)


if __name__ == "__main__":
    main()
