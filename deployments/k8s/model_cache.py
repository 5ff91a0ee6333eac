"""The shared model volume: a Job fills it, workers check that it is filled before they start.

`ACESTEP_REQUIRED_MODELS` names what must be there, as `kind:name` separated by blanks, such as `renderer:acestep-v15-turbo
planner:acestep-5Hz-lm-1.7B`. Only pods that may not download (`HF_HUB_OFFLINE`, which the volume's component sets) insist on it.
"""

from __future__ import annotations

import os
import sys
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import cast, get_args

from acestep.checkpoints.published import Kind
from acestep.errors import AceStepError, InvalidRequest, ModelMissing
from acestep.paths import checkpoints_dir, writable

ENV = "ACESTEP_REQUIRED_MODELS"


def offline(env: Mapping[str, str]) -> bool:
    """Whether these variables forbid downloads, as huggingface_hub reads them."""
    return env.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE")


def required(text: str | None = None) -> list[tuple[Kind, str]]:
    """What the environment (or `text`) asks for.

    Raises:
        InvalidRequest: an entry is not `kind:name`.
    """
    found: list[tuple[Kind, str]] = []
    for entry in (os.environ.get(ENV, "") if text is None else text).split():
        kind, separator, name = entry.partition(":")
        if not (separator and name and kind in get_args(Kind)):
            raise InvalidRequest(f"{ENV}: {entry!r} is not renderer:NAME or planner:NAME", field=ENV, asked=entry)
        found.append((cast(Kind, kind), name))
    return found


def _mark(root: Path, kind: str, name: str) -> Path:
    return root / ".complete" / f"{kind}-{urllib.parse.quote(name, safe='')}"


def fill(root: Path | None = None) -> list[str]:
    """Download and convert what is required and not there yet; safe to repeat. Returns what was added.

    A model's mark is written last, so an interrupted download is taken up again.
    """
    from acestep.checkpoints import resolve

    root = writable(root or checkpoints_dir())
    added = []
    for kind, name in required():
        mark = _mark(root, kind, name)
        if not mark.exists():
            resolve(name, kind, root=root)
            mark.parent.mkdir(exist_ok=True)
            mark.touch()
            added.append(f"{kind}:{name}")
    return added


def check(root: Path | None = None) -> None:
    """Raise unless everything that is required is there, or may be downloaded.

    Raises:
        ModelMissing: naming what is not, and the job that brings it.
    """
    if not offline(os.environ):
        return
    root = root or checkpoints_dir()
    missing = [f"{kind}:{name}" for kind, name in required() if not _mark(root, kind, name).exists()]
    if missing:
        raise ModelMissing(
            f"{root} does not hold {', '.join(missing)} yet. Has the Job acestep-model-download finished?",
            path=str(root), missing=missing,
        )  # fmt: skip


def main() -> None:
    if sys.argv[1:] not in (["fill"], ["check"]):
        sys.exit("usage: python -m deployments.k8s.model_cache fill|check")
    try:
        if sys.argv[1] == "check":
            check()
        else:
            print("\n".join(f"added {name}" for name in fill()) or "everything was there")
    except AceStepError as error:
        sys.exit(f"error ({error.type}): {error.message}")


if __name__ == "__main__":
    main()
