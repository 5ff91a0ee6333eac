"""Signing secrets, the same for all routers: from the environment, else made once and kept in the job database."""

from __future__ import annotations

import hashlib
import os
from secrets import token_bytes

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from deployments.jobs.database import writer
from deployments.jobs.schema import secrets


def shared_secret(engine: Engine, name: str, env: str) -> bytes:
    """32 bytes.

    Args:
        name: What it signs.
        env: Environment variable whose text it is derived from, where that is set.
    """
    if given := os.environ.get(env, "").strip():
        return hashlib.sha256(given.encode()).digest()
    query = sa.select(secrets.c.value).where(secrets.c.name == name)
    try:
        with writer(engine).begin() as db:
            if (found := db.execute(query).scalar()) is None:
                found = token_bytes(32)
                db.execute(secrets.insert().values(name=name, value=found))
            return bytes(found)
    except sa.exc.IntegrityError:  # another router made it at the same moment
        with engine.connect() as db:
            return bytes(db.execute(query).scalar_one())
