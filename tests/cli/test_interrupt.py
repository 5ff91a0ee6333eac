"""Ctrl-C before a command has begun."""

from __future__ import annotations

import subprocess
import sys

import pytest

IMPORTED = """
import signal, time
from acestep.cli import interrupt
{before}
interrupt.ends_at_once()
try:  # as in a module that tries to import another
    signal.raise_signal(signal.SIGINT)
except BaseException:
    pass
interrupt.is_raised()
signal.raise_signal(signal.SIGINT)
"""


@pytest.mark.parametrize(
    ("before", "code"), [("", 130), ("signal.signal(signal.SIGINT, signal.SIG_IGN)", 0)], ids=["heard", "ignored"]
)
def test_it_is_heard_while_modules_are_imported(before: str, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED.format(before=before)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "interrupted\n" if code else "")
