"""A day of song requests, the same for every policy that is compared on it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from acestep.request import SongRequest
from acestep.sizing import profiles
from acestep.sizing.cost import LYRIC_CHARS_PER_S, estimate

# A job is late where it takes longer than this and this many times what a typical card alone needs for it.
PATIENCE_S = 15.0
PATIENCE_FACTOR = 2.0
TYPICAL_CARD = "rtx-4080"
VERSE = "[Verse]\n" + "We ran until the morning came\nand nobody remembered why\n" * 3


@dataclass(frozen=True, slots=True)
class Arrival:
    """One job: when, what, whose, how long the planner will really make it, and by when it is late."""

    at: float
    request: SongRequest
    key: str
    duration: float
    patience: float


@dataclass(frozen=True)
class Kind:
    """A class of users. Durations are drawn evenly between the two; None leaves the length to the planner."""

    name: str
    durations: tuple[float, float] | None
    batches: tuple[int, ...]
    lyrics: bool
    thinking: bool


JINGLES = Kind("jingles", (10, 30), (1, 1, 2, 4), False, True)
SONGS = Kind("songs", (120, 240), (1, 2), True, True)
OPEN = Kind("songs of open length", None, (1, 1, 2), True, True)
RERENDERS = Kind("renders without planning", (60, 240), (1, 2, 4), True, False)
ALBUMS = Kind("long batches", (300, 600), (2, 4, 8), True, True)
KINDS = (JINGLES, SONGS, OPEN, RERENDERS, ALBUMS)


def _mix(hour: float) -> list[float]:
    """Shares of the kinds by hour: short and interactive by day, long batches by night."""
    night = 0.5 + 0.5 * math.cos(2 * math.pi * (hour - 2.0) / 24.0)
    return [0.50 - 0.3 * night, 0.20, 0.15, 0.10, 0.05 + 0.3 * night * night]


def _rate(hour: float) -> float:
    """Relative arrivals by hour, mean about 1."""
    return max(0.08, 1.0 + 0.9 * math.sin(2 * math.pi * (hour - 9.0) / 24.0))


def _duration(rng: random.Random, kind: Kind, verses: int) -> tuple[float | None, float]:
    if kind.durations is None:  # the planner's choice: by the lyrics, give or take a fifth
        return None, min(240.0, max(40.0, len(VERSE) * verses / LYRIC_CHARS_PER_S * math.exp(rng.gauss(0.0, 0.2))))
    low, high = kind.durations
    seconds = float(round(rng.uniform(low, high) / 5.0) * 5)
    return seconds, seconds


def request_of(kind: Kind, duration: float | None, batch: int, verses: int) -> SongRequest:
    return SongRequest(
        prompt="warm indie pop, female vocals", lyrics=VERSE * verses if kind.lyrics else "", duration=duration, batch_size=batch,
        thinking=kind.thinking, use_cot_metas=kind.thinking, seed=0,
    )  # fmt: skip


def day(
    jobs: int, *, seed: int = 1, hours: float = 24.0, burst_share: float = 0.25, callers: int = 40
) -> list[Arrival]:
    """`jobs` arrivals over `hours`; a quarter of them in bursts (one caller sends 10 to 60 at once).

    Args:
        callers: Keys, of which a few send most.
    """
    rng = random.Random(seed)
    typical = profiles.named(TYPICAL_CARD)
    made: dict[tuple[Kind, float | None, int, int], SongRequest] = {}
    out: list[Arrival] = []

    def add(at: float, kind: Kind, key: str) -> None:
        verses = rng.randint(4, 10)
        duration, real = _duration(rng, kind, verses)
        batch = rng.choice(kind.batches)
        kept = (kind, duration, batch, verses)
        request = made.get(kept) or made.setdefault(kept, request_of(*kept))
        service = estimate(request, typical, real, planner="1.7B").total_s
        out.append(Arrival(at, request, key, real, PATIENCE_S + PATIENCE_FACTOR * service))

    span = hours * 3600.0
    peak = max(_rate(h) for h in range(24))
    while len(out) < jobs:
        at = rng.uniform(0.0, span)
        if rng.random() * peak > _rate(24.0 * at / span):
            continue
        kind = rng.choices(KINDS, _mix(24.0 * at / span))[0]
        key = f"key{int(callers * rng.random() ** 2)}"
        if rng.random() < burst_share / 20.0:
            for _ in range(rng.randint(10, 60)):
                add(at + rng.uniform(0.0, 5.0), kind, key)
        else:
            add(at, kind, key)
    return sorted(out[:jobs], key=lambda a: a.at)
