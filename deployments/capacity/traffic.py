"""Traffic: mixes of kinds of songs by the hour, and the jobs of a day that they make, the same for every fleet that is compared on it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from acestep.request import MAX_BATCH, MAX_DURATION_S, MIN_DURATION_S, SongRequest
from acestep.sizing import profiles
from acestep.sizing.cost import LYRIC_CHARS_PER_S, estimate

# Where nobody asked for a deadline, a job is late that takes longer than this and this many times what a typical card alone needs for it.
PATIENCE_S = 15.0
PATIENCE_FACTOR = 2.0
TYPICAL_CARD, TYPICAL_PLANNER = "rtx-4080", "1.7B"
VERSE = "[Verse]\n" + "We ran until the morning came\nand nobody remembered why\n" * 3
HOURS = 24.0
MOST_JOBS_PER_HOUR = 100_000.0
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=MIN_DURATION_S, le=MAX_DURATION_S)]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One job of a traffic.

    Attributes:
        at: Seconds from the beginning.
        key: Whose it is.
        duration: Seconds of audio per item that it really gets, the planner's choice included.
        deadline_s: Within what time it should be done.
        firm: That was asked for as `deadline_s`: it is refused where it cannot be made, and given up once it is over.
    """

    at: float
    request: SongRequest
    key: str
    duration: float
    deadline_s: float
    firm: bool = False


class Kind(BaseModel):
    """A class of jobs.

    Args:
        share, night_share: Of all jobs, by day and by night; the second is the first where it is left out.
        duration: Seconds of audio, drawn evenly between the two; None leaves the length to the planner.
        batch: Items of one job, drawn from these.
        thinking: Whether the planner writes codes.
        model: Renderer checkpoint; None: the fleet's.
        deadline_s: What is asked for with each job; None: nothing, and late is what takes more than twice what a typical card needs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1, max_length=64)
    share: Share
    night_share: Share | None = None
    duration: tuple[Seconds, Seconds] | None = None
    batch: tuple[Annotated[int, Field(ge=1, le=MAX_BATCH)], ...] = Field((1,), min_length=1)
    lyrics: bool = True
    thinking: bool = True
    model: str | None = None
    deadline_s: float | None = Field(None, gt=0, le=86_400)


class Traffic(BaseModel):
    """A mix of kinds, and when they come.

    Args:
        jobs_per_hour: On average over the day.
        by_hour: `flat`, `day` (little by night, twice the mean in the afternoon), or 24 relative rates.
        burst_share: Part of the jobs that come in bursts: one key sends so many within five seconds.
        keys: Callers, of which a few send most.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    about: str = ""
    jobs_per_hour: float = Field(gt=0, le=MOST_JOBS_PER_HOUR)
    by_hour: Literal["flat", "day"] | tuple[Share, ...] = "day"
    burst_share: float = Field(0.0, ge=0, lt=1)
    burst_jobs: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1, le=10_000)]] = (10, 40)
    keys: int = Field(40, ge=1)
    kinds: tuple[Kind, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _adds_up(self) -> Traffic:
        if not isinstance(self.by_hour, str) and (len(self.by_hour) != 24 or not sum(self.by_hour)):
            raise ValueError(f"by_hour: needs 24 numbers, not all of them 0; has {len(self.by_hour)}")
        if any(sum(self.shares(hour)) <= 0 for hour in range(24)):
            raise ValueError("kinds: their shares are 0 at some hour")
        for kind in self.kinds:
            if kind.duration and kind.duration[0] > kind.duration[1]:
                raise ValueError(f"kinds: duration of {kind.name!r} must have the shorter one first")
        if self.burst_jobs[0] > self.burst_jobs[1]:
            raise ValueError("burst_jobs: must have the smaller number first")
        return self

    def shares(self, hour: float) -> list[float]:
        """Of the kinds at an hour of the day."""
        night = 0.5 + 0.5 * math.cos(2 * math.pi * (hour - 2.0) / 24.0)
        return [k.share + ((k.share if k.night_share is None else k.night_share) - k.share) * night for k in self.kinds]

    def rate(self, hour: float) -> float:
        """Jobs at an hour of the day, relative to the mean."""
        if self.by_hour == "flat":
            return 1.0
        if self.by_hour == "day":
            return max(0.08, 1.0 + 0.9 * math.sin(2 * math.pi * (hour - 9.0) / 24.0))
        return self.by_hour[int(hour) % 24]


@cache
def shipped() -> dict[str, Traffic]:
    """The mixes that come with the project, by name."""
    text = resources.files("deployments.capacity").joinpath("mixes.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return {name: Traffic.model_validate(mix) for name, mix in data.items()}


def request_of(kind: Kind, duration: float | None, batch: int, verses: int) -> SongRequest:
    return SongRequest(
        prompt="warm indie pop, female vocals", lyrics=VERSE * verses if kind.lyrics else "", duration=duration, batch_size=batch,
        thinking=kind.thinking, use_cot_metas=kind.thinking, model=kind.model, seed=0,
    )  # fmt: skip


def patience_of(request: SongRequest, duration: float) -> float:
    """Within what time a job should be done for which nobody asked a deadline."""
    typical = profiles.named(TYPICAL_CARD)
    return PATIENCE_S + PATIENCE_FACTOR * estimate(request, typical, duration, planner=TYPICAL_PLANNER).total_s


def arrivals(traffic: Traffic, *, jobs: int | None = None, hours: float = HOURS, seed: int = 1) -> list[Arrival]:
    """The jobs of one day, in the order in which they come.

    Args:
        jobs: How many; None: by the traffic's own rate.
        hours: A shorter day has all its hours, each of them shorter.
    """
    rng = random.Random(seed)
    wanted = max(1, round(traffic.jobs_per_hour * hours)) if jobs is None else jobs
    span = hours * 3600.0
    peak = max(traffic.rate(h) for h in range(24))
    mean_burst = sum(traffic.burst_jobs) / 2
    bursts = traffic.burst_share / (traffic.burst_share + (1.0 - traffic.burst_share) * mean_burst)
    made: dict[tuple[Kind, float | None, int, int], SongRequest] = {}
    patiences: dict[tuple[int, float], float] = {}
    out: list[Arrival] = []

    def add(at: float, kind: Kind, key: str) -> None:
        verses = rng.randint(4, 10)
        duration, real = _duration(rng, kind, verses)
        kept = (kind, duration, rng.choice(kind.batch), verses)
        request = made.get(kept) or made.setdefault(kept, request_of(*kept))
        patience = kind.deadline_s
        if patience is None:
            asked = (id(request), real)
            patience = patiences.get(asked) or patiences.setdefault(asked, patience_of(request, real))
        out.append(Arrival(at, request, key, real, patience, firm=kind.deadline_s is not None))

    while len(out) < wanted:
        at = rng.uniform(0.0, span)
        hour = 24.0 * at / span
        if rng.random() * peak > traffic.rate(hour):
            continue
        kind = rng.choices(traffic.kinds, traffic.shares(hour))[0]
        key = f"key{int(traffic.keys * rng.random() ** 2)}"
        if rng.random() < bursts:
            for _ in range(rng.randint(*traffic.burst_jobs)):
                add(at + rng.uniform(0.0, 5.0), kind, key)
        else:
            add(at, kind, key)
    return sorted(out[:wanted], key=lambda a: a.at)


def _duration(rng: random.Random, kind: Kind, verses: int) -> tuple[float | None, float]:
    if kind.duration is None:  # the planner's choice: by the lyrics, give or take a fifth
        return None, min(240.0, max(40.0, len(VERSE) * verses / LYRIC_CHARS_PER_S * math.exp(rng.gauss(0.0, 0.2))))
    low, high = kind.duration
    seconds = min(high, max(low, float(round(rng.uniform(low, high) / 5.0) * 5)))
    return seconds, seconds
