"""`--set name=value`: the settings of docs/tiers.md as flags, for the commands that compute in their own process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from acestep.errors import InvalidRequest

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", help="A setting as name=value, such as device=cpu (repeatable; docs/tiers.md has all)."
    ),
]


def given(texts: Sequence[str] | None) -> dict[str, str]:
    """The settings by name. What they mean, and whether they exist, is for `acestep.settings.resolve.resolve`.

    Raises:
        InvalidRequest: a text is not name=value.
    """
    found = {}
    for text in texts or ():
        name, separator, value = text.partition("=")
        if not separator or not name.strip():
            raise InvalidRequest(f"--set: {text!r} is not name=value", field="set", asked=text)
        found[name.strip()] = value
    return found
