"""Which checkpoint a pool serves, for commands that prepare it before Serve starts."""

from __future__ import annotations

from acestep.checkpoints import Checkpoint
from deployments.config import PoolArgs
from deployments.replica import Role, settle


def checkpoint_for(role: Role, args: PoolArgs) -> Checkpoint | None:
    """Resolve (and download, or make) the checkpoint of a pool. None where its planner is switched off here."""
    start = settle(role, args)
    if role == "plan" and not start.settings.lm_enabled:
        return None
    return start.checkpoint()
