"""Tables of the documentation that are data here, and their places: between `<!-- table:NAME -->` and `<!-- /table -->`.

NAME is `tiers PROFILE` or `settings`. `python -m tools.doc_tables --write FILE...` renews them; a test sees that they are current.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from acestep.gpu_config import PROFILES, GPUConfig, get_lm_model_size, get_profile
from acestep.settings.options import OPTIONS

_BLOCK = re.compile(r"(<!-- table:([^>]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
_HEAD = """\
| VRAM (GiB) | tier | as detected (MiB) | planner sizes (GiB set aside) | recommended | longest song in s: planner on the card / not \
| largest batch: planner on the card / not | planner on by default | int8 on a card by default |
|---|---|---|---|---|---|---|---|---|
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
        f"{size} ({'unrestricted' if gib is None else f'{gib:g}'})" for size, gib in row.lm_memory_gb.items()
    )
    seconds = row.max_duration_with_lm if offered else "–"
    batch = row.max_batch_size_with_lm if offered else "–"
    cells = (
        _gib_range(row, after),
        f"`{row.label}`",
        _mib_range(row, after),
        sizes or "none",
        get_lm_model_size(row.recommended_lm_model) if offered else "–",
        f"{seconds} / {row.max_duration_without_lm}",
        f"{batch} / {row.max_batch_size_without_lm}",
        "yes" if row.init_lm_default else "no (optional)" if offered else "no",
        "yes" if row.int8_default else "no",
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


def settings_markdown() -> str:
    """Every setting with its variable."""
    lines = ["| setting | variable | what it is |", "|---|---|---|"]
    lines += [f"| `{option.name}` | `{option.env}` | {option.doc} |" for option in OPTIONS.values()]
    return "\n".join(lines) + "\n"


def table(name: str) -> str:
    """The table that a marker names.

    Raises:
        ValueError: there is no such table.
    """
    kind, _, which = name.partition(" ")
    if kind == "tiers":
        return markdown(which or None)
    if kind == "settings":
        return settings_markdown()
    raise ValueError(f"no table is called {name!r}")


def refresh(text: str) -> str:
    """`text` with every marked block renewed from the data."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{table(block[2])}\n{block[3]}", text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.doc_tables", description="The tier tables, from the data.")
    parser.add_argument("--profile", choices=sorted(PROFILES), help="one table only")
    parser.add_argument(
        "--write", metavar="FILE", nargs="+", default=(), type=Path,
        help="renew the tables between the markers of Markdown files instead",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    for file in options.write:
        file.write_text(refresh(file.read_text(encoding="utf-8")), encoding="utf-8")
    if not options.write:
        print("\n".join(markdown(name) for name in ([options.profile] if options.profile else PROFILES)), end="")


if __name__ == "__main__":
    main()
