"""A card of another size than the one that is here: upstream's `MAX_CUDA_VRAM`, for tests and for trying out a smaller card."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from acestep.errors import InvalidRequest

SIMULATE_ENV = "MAX_CUDA_VRAM"
# With this set, the size in MAX_CUDA_VRAM counts as a card's report: 15.7 is a 16 GB card then.
AS_DETECTED_ENV = "MAX_CUDA_VRAM_AS_DETECTED"


def simulated_gib(env: Mapping[str, str] | None = None) -> float | None:
    """The card size in GiB that `MAX_CUDA_VRAM` asks to simulate, or None.

    Raises:
        InvalidRequest: the value is no positive number; the message names the variable.
    """
    text = (os.environ if env is None else env).get(SIMULATE_ENV, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InvalidRequest(
            f"{SIMULATE_ENV}: {text!r} is not a positive number of GiB; unset it or give one such as 8",
            field=SIMULATE_ENV, asked=text,
        )  # fmt: skip
    return value


def simulated_as_detected(env: Mapping[str, str] | None = None) -> bool:
    """Whether `MAX_CUDA_VRAM_AS_DETECTED` has the simulated size counted as a card's report.

    Raises:
        InvalidRequest: it says neither yes nor no.
    """
    text = (os.environ if env is None else env).get(AS_DETECTED_ENV, "").strip()
    if text.lower() in ("1", "true", "yes", "y", "on"):
        return True
    if text.lower() in ("", "0", "false", "no", "n", "off"):
        return False
    raise InvalidRequest(
        f"{AS_DETECTED_ENV}: {text!r} is not possible; allowed: true, false", field=AS_DETECTED_ENV, asked=text
    )
