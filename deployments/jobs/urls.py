"""Database URLs as operators write them, with the driver that this project installs."""

from __future__ import annotations

import sqlalchemy as sa


def driver_url(url: str) -> sa.URL:
    """The URL, with `psycopg` for a PostgreSQL one that names no driver.

    Raises:
        sqlalchemy.exc.ArgumentError: it is no SQLAlchemy URL.
    """
    parsed = sa.make_url("postgresql" + url.removeprefix("postgres") if url.startswith("postgres://") else url)
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed
