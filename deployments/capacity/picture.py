"""A simulated day as a picture: what came, how long it waited, and the cards that were there, hour by hour. SVG, written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from deployments.capacity.result import Result, quantile

WIDTH, HEIGHT, LEFT, GAP = 860, 130, 60, 46
BINS = 96
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")  # Paul Tol's bright scheme


def picture(result: Result, title: str) -> str:
    """An SVG document of three charts over the same hours: jobs, waits, cards."""
    span = max(1.0, result.span_s)
    jobs = [0] * BINS
    late = [0] * BINS
    waits: list[list[float]] = [[] for _ in range(BINS)]
    for song in result.songs:
        place = min(BINS - 1, int(song.arrival.at / span * BINS))
        jobs[place] += 1
        late[place] += not song.kept
        if song.first_begun is not None:
            waits[place].append(song.first_begun - song.arrival.at)
    p95 = [quantile(w, 0.95) if w else 0.0 for w in waits]
    cards = {p.spec.name: _sizes(p.sizes, span) for p in result.pools}
    height = 3 * (HEIGHT + GAP) + 60 + 18 * len(cards)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
    ]
    parts += _chart(
        0,
        "jobs (red: not in time)",
        max(1, *jobs),
        span,
        [*_bars(jobs, max(jobs), 0, COLOURS[0]), *_bars(late, max(jobs), 0, COLOURS[1])],
    )
    parts += _chart(1, "95 of 100 begin within, s", max(1.0, *p95), span, _line(p95, max(1.0, *p95), 1, COLOURS[0]))
    most = max((max(line) for line in cards.values()), default=1) or 1
    lines = [mark for n, line in enumerate(cards.values()) for mark in _line(line, most, 2, COLOURS[n % len(COLOURS)])]
    parts += _chart(2, "cards that serve", most, span, lines)
    for n, name in enumerate(cards):
        y = 3 * (HEIGHT + GAP) + 46 + 18 * n
        parts.append(
            f'<rect x="{LEFT}" y="{y - 9}" width="10" height="10" fill="{COLOURS[n % len(COLOURS)]}"/><text x="{LEFT + 16}" y="{y}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _sizes(sizes: Sequence[tuple[float, int]], span: float) -> list[float]:
    """The size at the end of each bin."""
    out, size, at = [], 0, 0
    for place in range(BINS):
        while at < len(sizes) and sizes[at][0] <= (place + 1) / BINS * span:
            size, at = sizes[at][1], at + 1
        out.append(float(size))
    return out


def _top(number: int) -> int:
    return 44 + number * (HEIGHT + GAP)


def _chart(number: int, label: str, most: float, span: float, marks: Iterable[str]) -> Iterator[str]:
    top, right = _top(number), WIDTH - 20
    bottom = top + HEIGHT
    yield f'<text x="{LEFT}" y="{top - 6}">{escape(label)}</text>'
    yield f'<path d="M{LEFT} {top}V{bottom}H{right}" fill="none" stroke="#888"/>'
    yield f'<text x="{LEFT - 6}" y="{top + 10}" text-anchor="end">{most:.0f}</text><text x="{LEFT - 6}" y="{bottom}" text-anchor="end">0</text>'
    for quarter in range(5):
        x = LEFT + (right - LEFT) * quarter / 4
        yield f'<text x="{x:.0f}" y="{bottom + 16}" text-anchor="middle">{span / 3600 * quarter / 4:.3g} h</text>'
    yield from marks


def _bars(values: Sequence[float], most: float, number: int, colour: str) -> Iterator[str]:
    step = (WIDTH - 20 - LEFT) / BINS
    for n, value in enumerate(values):
        if value:
            high = HEIGHT * value / most
            yield f'<rect x="{LEFT + n * step:.1f}" y="{_top(number) + HEIGHT - high:.1f}" width="{step - 1:.1f}" height="{high:.1f}" fill="{colour}"/>'


def _line(values: Sequence[float], most: float, number: int, colour: str) -> Iterator[str]:
    step = (WIDTH - 20 - LEFT) / BINS
    points = " ".join(
        f"{LEFT + (n + 0.5) * step:.1f},{_top(number) + HEIGHT * (1 - v / most):.1f}" for n, v in enumerate(values)
    )
    yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
