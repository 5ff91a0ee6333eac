"""The tier tables as Markdown, and their place in a document: between `<!-- tiers:NAME -->` and `<!-- /tiers -->`."""

from __future__ import annotations

import re
from pathlib import Path

from acestep.gpu_config import GPUConfig, get_profile

_BLOCK = re.compile(r"(<!-- tiers:([^ ]+) -->\n).*?(<!-- /tiers -->)", re.DOTALL)
_HEAD = """\
| VRAM (GiB) | tier | as detected (MiB) | planner sizes (GiB set aside) | recommended | longest song in s: planner on the card / not \
| largest batch: planner on the card / not | planner on by default |
|---|---|---|---|---|---|---|---|
"""


def markdown(profile: str | None = None) -> str:
    """One table with its name and source."""
    table = get_profile(profile)
    followers = [*table.rows[1:], None]
    lines = [_line(row, after) for row, after in zip(table.rows, followers, strict=True)]
    return f"Profile `{table.name}`, from {table.source}.\n\n{_HEAD}" + "\n".join(lines) + "\n"


def _line(row: GPUConfig, after: GPUConfig | None) -> str:
    offered = bool(row.available_lm_models)
    sizes = ", ".join(
        f"{size} ({'unrestricted' if gib is None else f'{gib:g}'})"
        for size, gib in zip(row.available_lm_models, row.lm_memory_gb, strict=True)
    )
    seconds = row.max_duration_with_lm if offered else "–"
    batch = row.max_batch_size_with_lm if offered else "–"
    cells = (
        _gib_range(row, after),
        f"`{row.label}`",
        _mib_range(row, after),
        sizes or "none",
        row.recommended_lm_model or "–",
        f"{seconds} / {row.max_duration_without_lm}",
        f"{batch} / {row.max_batch_size_without_lm}",
        "yes" if row.init_lm_default else "no (optional)" if offered else "no",
    )
    return f"| {' | '.join(cells)} |"


def _gib_range(row: GPUConfig, after: GPUConfig | None) -> str:
    low = f"{'≥' if row.includes_border else '>'} {row.opens_gib:g}"
    if after is None:
        return low
    high = f"{'<' if after.includes_border else '≤'} {after.opens_gib:g}"
    return f"{high}, and CPU" if row.opens_gib == 0 else f"{low}, {high}"


def _mib_range(row: GPUConfig, after: GPUConfig | None) -> str:
    if after is None:
        return f"≥ {row.first_mib}"
    return f"{row.first_mib} – {after.first_mib - 1}"


def refresh(text: str) -> str:
    """`text` with every marked block renewed from the data."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{markdown(block[2])}\n{block[3]}", text)


def refresh_file(path: str | Path) -> None:
    """Renew the marked blocks of a file in place."""
    file = Path(path)
    file.write_text(refresh(file.read_text(encoding="utf-8")), encoding="utf-8")
