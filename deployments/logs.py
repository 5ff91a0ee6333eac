"""Our log lines go where Serve's go: to its files and, under `serve run`, to the terminal, in the encoding of `logging_config`."""

from __future__ import annotations

import logging

SERVE = "ray.serve"


def join_serve() -> None:
    """Route the loggers of both packages through Serve's. Call it in a replica's constructor."""
    for name in ("acestep", "deployments"):
        ours = logging.getLogger(name)
        ours.parent = logging.getLogger(SERVE)
        ours.setLevel(logging.NOTSET)
