"""What a day of traffic asks of cards: jobs of a kind put together, with how many come in each part of the day, and what they take of which card."""

from __future__ import annotations

from bisect import bisect_left as bisect
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from acestep.gpu_config import get_gpu_config, get_limits
from acestep.sizing.cost import needs_planner, plan_seconds, render_seconds
from acestep.sizing.limits import fits
from acestep.sizing.profiles import named
from deployments.capacity.catalogue import Offer
from deployments.capacity.held import holds, planner_rows
from deployments.capacity.traffic import Arrival

PERIODS = 8
LENGTHS_S = (30.0, 60.0, 120.0, 180.0, 240.0, 360.0, 480.0)  # songs between two of these are weighed as one kind


@dataclass(frozen=True)
class JobClass:
    """Jobs that ask for much the same.

    Attributes:
        typical: The one of median length; all are weighed as it is.
        jobs: How many come in each part of the day.
    """

    typical: Arrival
    jobs: tuple[int, ...]

    @property
    def planned(self) -> bool:
        return needs_planner(self.typical.request)


@dataclass(frozen=True)
class Demand:
    """A day of traffic. `period_s`: how long each of its equal parts lasts."""

    classes: tuple[JobClass, ...]
    period_s: float

    @property
    def periods(self) -> int:
        return len(self.classes[0].jobs)


@dataclass(frozen=True)
class Work:
    """What one job of a class takes of one card: seconds of the card, and seconds until it is done alone."""

    work_s: float
    wall_s: float


def demand_of(arrivals: Sequence[Arrival], hours: float) -> Demand:
    """A day's jobs by class and part of the day."""
    span = hours * 3600.0
    groups: dict[tuple[object, ...], list[Arrival]] = defaultdict(list)
    for arrival in arrivals:
        request = arrival.request
        kind = (
            request.model,
            request.task,
            needs_planner(request),
            request.thinking,
            bisect(LENGTHS_S, arrival.duration),
            request.batch_size,
            arrival.deadline_s,
        )
        groups[kind if arrival.firm else kind[:-1]].append(arrival)
    classes = []
    for group in groups.values():
        counts = [0] * PERIODS
        for arrival in group:
            counts[min(PERIODS - 1, int(arrival.at / span * PERIODS))] += 1
        ordered = sorted(group, key=lambda a: a.duration)
        classes.append(JobClass(ordered[len(ordered) // 2], tuple(counts)))
    return Demand(tuple(classes), span / PERIODS)


def render_work(job: JobClass, offer: Offer, model: str) -> Work | None:
    """None where the card cannot hold the model, or its limits do not let it render such a job whole."""
    arrival, request = job.typical, job.typical.request
    limits = get_limits(get_gpu_config(offer.tier), "render")
    if not fits(request, limits) or arrival.duration > limits.max_duration or not holds(offer.card, model):
        return None
    profile = named(offer.card)
    seconds = render_seconds(
        request, profile.renderer(model), arrival.duration, model=model, items=request.batch_size, output_s=profile.output_s
    )  # fmt: skip
    return Work(seconds.work_s, seconds.wall_s)


def plan_work(job: JobClass, offer: Offer, planner: str) -> Work | None:
    """None where the card cannot hold the planner."""
    if not (rows := planner_rows(offer.card, planner)):
        return None
    seconds = plan_seconds(job.typical.request, named(offer.card).planner(planner), job.typical.duration, slots=rows)
    return Work(seconds.work_s, seconds.wall_s)
