"""A scatter plot as SVG text, for machines without matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 440, 70, 55, 40, 20
COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#6d597a")


def scatter(series: Mapping[str, Sequence[tuple[float, float, str]]], *, title: str, x: str, y: str) -> str:
    """Points (x, y, label) of each series, joined by a line, axes from zero."""
    points = [p for values in series.values() for p in values]
    top_x = 1.1 * max((p[0] for p in points), default=1.0) or 1.0
    top_y = 1.1 * max((p[1] for p in points), default=1.0) or 1.0

    def at(px: float, py: float) -> tuple[float, float]:
        across = LEFT + px / top_x * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(HEIGHT - BOTTOM - py / top_y * (HEIGHT - BOTTOM - TOP), 1)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x)}</text>',
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>',
    ]
    for i in range(6):
        tick_x, tick_y = at(top_x * i / 5, 0), at(0, top_y * i / 5)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{tick_y[1]}" y2="{tick_y[1]}" stroke="#ddd"/>')
        out.append(f'<text x="{tick_x[0]}" y="{tick_x[1] + 18}" text-anchor="middle">{top_x * i / 5:.3g}</text>')
        out.append(f'<text x="{LEFT - 8}" y="{tick_y[1] + 4}" text-anchor="end">{top_y * i / 5:.3g}</text>')
    for number, (name, values) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        ordered = sorted(values)
        path = " ".join(f"{a},{b}" for a, b in (at(p[0], p[1]) for p in ordered))
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
        for px, py, label in ordered:
            a, b = at(px, py)
            out.append(
                f'<circle cx="{a}" cy="{b}" r="4" fill="{colour}"/><text x="{a + 6}" y="{b - 6}">{escape(label)}</text>'
            )
        out.append(
            f'<text x="{WIDTH - RIGHT}" y="{TOP + 16 * number}" text-anchor="end" fill="{colour}">{escape(name)}</text>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"
