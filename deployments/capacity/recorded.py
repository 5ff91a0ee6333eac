"""Traffic as it was: jobs of a file, or of the job store's own history."""

from __future__ import annotations

import json
import re
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from acestep.checkpoints.resolve import check_name
from acestep.errors import InvalidRequest
from acestep.request import SongRequest
from acestep.sizing.cost import expected_duration
from acestep.validation import did_you_mean, first_problem
from deployments.capacity.plan import Day
from deployments.capacity.traffic import Arrival, Traffic, arrivals, patience_of, shipped
from deployments.jobs.database import reading
from deployments.jobs.schema import jobs

_SPAN = re.compile(r"(\d{1,4}(?:\.\d+)?)([smhd])")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
MOST_JOBS = 200_000
LEAST_S = 600.0  # a shorter record says little of an hour


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")
    at: float = Field(ge=0, allow_inf_nan=False, description="Seconds from the beginning.")
    request: dict[str, Any] = Field(description="As POST /v1/music takes it.")
    key: str = ""
    duration: float | None = Field(None, gt=0, description="What the planner made of it.")
    deadline_s: float | None = Field(None, gt=0)


def read_traffic(name: str, rate: float | None = None) -> Day:
    """Days of a traffic: a shipped mix by name, a mix in a YAML file, or jobs in a JSONL file, one a line.

    Args:
        rate: Jobs an hour in place of the mix's own.

    Raises:
        InvalidRequest: there is none of that name, or the file is not understood; the message names the field.
        ModelMissing: a mix names a model that there is not.
    """
    if name in shipped():
        return day_of(shipped()[name], rate)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".jsonl") or not path.is_file():
        raise InvalidRequest(
            f"--traffic: {name!r} is none of {', '.join(shipped())}, and no file NAME.yaml (a mix) or NAME.jsonl (jobs). "
            + did_you_mean(name, shipped()).capitalize(),
            field="traffic", asked=name,
        )  # fmt: skip
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--traffic: {path}: {error}", field="traffic") from None
    if path.suffix == ".jsonl":
        if rate is not None:
            raise InvalidRequest("--rate: jobs of a file come when it says; leave it out", field="rate")
        return window_of(list(_lines(path, text)))
    try:
        mix = Traffic.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise InvalidRequest(f"--traffic: {path} is no YAML: {error}", field="traffic") from None
    except ValidationError as error:
        field, message = first_problem(error)
        raise InvalidRequest(f"--traffic: {path}: {field}: {message}", field="traffic") from None
    for kind in mix.kinds:
        if kind.model is not None:
            check_name(kind.model, "renderer")
    return day_of(mix, rate)


def day_of(traffic: Traffic, rate: float | None = None) -> Day:
    """Days of a mix. One of more jobs than are wanted is shorter, at the same rate."""
    mix = traffic if rate is None else traffic.model_copy(update={"jobs_per_hour": rate})

    def day(most: int, seed: int) -> tuple[Sequence[Arrival], float]:
        hours = min(24.0, max(0.5, most / mix.jobs_per_hour))
        return arrivals(mix, hours=hours, seed=seed), hours

    return day


def window_of(recorded: Sequence[Arrival]) -> Day:
    """The busiest part of a record that has no more jobs than are wanted, and lasts a day at most.

    Raises:
        InvalidRequest: there are no jobs in it.
    """
    if not recorded:
        raise InvalidRequest("traffic: there are no jobs in it", field="traffic")
    ordered = sorted(recorded, key=lambda a: a.at)
    times = [a.at for a in ordered]

    def day(most: int, seed: int) -> tuple[Sequence[Arrival], float]:
        whole = times[-1] - times[0]
        span = min(86_400.0, whole)
        counts: list[int] = []
        while True:
            counts = [bisect_left(times, at + span) - i for i, at in enumerate(times)]
            if max(counts) <= most or span <= LEAST_S:
                break
            span = max(LEAST_S, span * 0.8)
        first = counts.index(max(counts))
        part = ordered[first : first + max(counts) + (1 if span == whole else 0)]
        begin = part[0].at
        moved = [Arrival(a.at - begin, a.request, a.key, a.duration, a.deadline_s, a.firm) for a in part]
        return moved, max(span, LEAST_S) / 3600

    return day


def read_jobs(database_url: str, since_s: float) -> list[Arrival]:
    """Songs that a job store was asked for within the last so many seconds.

    Raises:
        InvalidRequest: there is no job store there, or there were none.
    """
    now = time.time()
    query = (
        sa.select(jobs.c.request, jobs.c.plan, jobs.c.owner_key, jobs.c.deadline, jobs.c.created_at)
        .where(jobs.c.kind == "song", jobs.c.created_at > now - since_s)
        .order_by(jobs.c.created_at.desc())
        .limit(MOST_JOBS)
    )
    with reading(database_url) as db:
        rows = db.execute(query).mappings().all()
    if not rows:
        raise InvalidRequest("--from-jobs: nobody asked for a song in that time", field="from_jobs")
    found = []
    for row in rows:
        planned: Mapping[str, Any] = (row["plan"] or {}).get("metadata") or {}
        within = None if row["deadline"] is None else row["deadline"] - row["created_at"]
        request = SongRequest.model_validate(row["request"])
        found.append(_arrival(row["created_at"], request, row["owner_key"], planned.get("duration"), within))
    return found


def seconds_of(text: str) -> float:
    """`90s`, `30m`, `12h` or `7d` in seconds.

    Raises:
        InvalidRequest: it is none of these.
    """
    match = _SPAN.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise InvalidRequest(f"--from-jobs: {text!r} is no time such as 12h or 7d", field="from_jobs", asked=text)
    return float(match[1]) * _UNITS[match[2]]


def _lines(path: Path, text: str) -> Iterator[Arrival]:
    for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
        try:
            job = _Line.model_validate(json.loads(line))
            request = SongRequest.model_validate(job.request)
        except ValidationError as error:
            field, message = first_problem(error)
            raise InvalidRequest(f"--traffic: {path}, line {number}: {field}: {message}", field="traffic") from None
        except json.JSONDecodeError as error:
            raise InvalidRequest(f"--traffic: {path}, line {number} is no JSON: {error}", field="traffic") from None
        yield _arrival(job.at, request, job.key, job.duration, job.deadline_s)


def _arrival(at: float, request: SongRequest, key: str, duration: float | None, within: float | None) -> Arrival:
    seconds = expected_duration(request)[0] if duration is None or request.duration is not None else duration
    if within is not None and within > 0:
        return Arrival(at, request, key, seconds, within, firm=True)
    return Arrival(at, request, key, seconds, patience_of(request, seconds))
