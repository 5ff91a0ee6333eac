"""What callers see and keep of their jobs: the short list, titles, favourites, labels.

A list of songs reads neither codes nor manifests: what it needs of the large JSON columns is taken out by the database.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from deployments.jobs.database import writer
from deployments.jobs.schema import jobs

MAX_TITLE, MAX_LABEL, MAX_LABELS, MAX_SEARCH = 200, 64, 16, 200


@dataclass(frozen=True)
class Wanted:
    """Which jobs a list shows; what is empty or None does not matter.

    Attributes:
        before: (created_at, id) of the last job of the page before.
        text: What stands in the title, the description, the lyrics or the planner's caption.
    """

    states: Sequence[str] = ()
    kind: str | None = None
    owner_key: str | None = None
    before: tuple[float, str] | None = None
    text: str | None = None
    favourite: bool | None = None
    label: str | None = None

    def apply(self, query: sa.Select[Any]) -> sa.Select[Any]:
        """The query for these alone, newest first."""
        c = jobs.c
        if self.states:
            query = query.where(c.state.in_(self.states))
        if self.kind is not None:
            query = query.where(c.kind == self.kind)
        if self.owner_key is not None:
            query = query.where(c.owner_key == self.owner_key)
        if self.before is not None:
            at, last = self.before
            query = query.where(sa.or_(c.created_at < at, sa.and_(c.created_at == at, c.id < last)))
        if self.favourite is not None:
            query = query.where(c.favourite.is_(self.favourite))
        if self.label is not None:
            query = query.where(sa.cast(c.labels, sa.Text).contains(json.dumps(self.label), autoescape=True))
        if self.text:
            places = (
                c.title, c.request["prompt"].as_string(), c.request["lyrics"].as_string(), _CAPTION.as_string(),
            )  # fmt: skip
            query = query.where(sa.or_(*(place.icontains(self.text, autoescape=True) for place in places)))
        return query.order_by(c.created_at.desc(), c.id.desc())


_CAPTION = jobs.c.plan[("metadata", "caption")]
_COLUMNS = (
    "id", "kind", "state", "stage", "progress", "title", "favourite", "labels", "created_at", "finished_at",
    "cancel_requested", "error",
)  # fmt: skip


def short_rows(engine: Engine, wanted: Wanted, limit: int) -> list[dict[str, Any]]:
    """The jobs of a list: light columns, and of the large ones `prompt`, `task`, `metadata`, `items`, `duration`."""
    c = jobs.c
    query = sa.select(
        *(c[name] for name in _COLUMNS),
        c.request["prompt"].as_string().label("prompt"),
        c.request["task"].as_string().label("task"),
        c.plan["metadata"].as_json().label("metadata"),
        c.result["items"].as_json().label("items"),
    )
    with engine.connect() as db:
        return [dict(row) for row in db.execute(wanted.apply(query).limit(limit)).mappings()]


def describe(engine: Engine, job_id: str, changes: dict[str, Any]) -> bool:
    """Set `title`, `favourite` or `labels` of a job. False where it is gone."""
    with writer(engine).begin() as db:
        return bool(db.execute(jobs.update().where(jobs.c.id == job_id).values(**changes)).rowcount)
