"""Ctrl-C while modules are imported: some of them swallow whatever is raised meanwhile, an interrupt, too."""

from __future__ import annotations

import os
import signal
from typing import Any


def ends_at_once() -> None:
    """From here on Ctrl-C ends this process at once, with exit code 130: there is nothing yet to put away. Where it is ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def is_raised() -> None:
    """From here on it is a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)
