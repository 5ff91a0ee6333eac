"""Starting and ending the processes of tests. As a program, `python tests/processes.py COMMAND ...`, it runs a command that starts a Ray node, again
where Ray gave up because the machine is busy."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from deployments.launch.process import RAY_WAS_LATE

TRIES = 3
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1  # prctl(2)


def ends_with_us(by: signal.Signals = signal.SIGINT) -> Callable[[], None]:
    """For `preexec_fn`: the process is told to end when the tests are killed, and takes Ctrl-C also where they run in the background."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _LIBC.prctl(_PR_SET_PDEATHSIG, by)

    return prepare


def kill_session(leader: int, but: int | None = None) -> None:
    """End what is left of a session that we started, and nothing else; not the process `but`."""
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        try:
            if pid != but and os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)
        except OSError:
            continue  # it ended while we looked


def main(command: list[str]) -> int:
    told = sys.stdin.buffer.read()
    log = Path("/proc/self/fd/1").resolve()
    for left in reversed(range(TRIES)):
        begun = log.stat().st_size
        child = subprocess.Popen(command, stdin=subprocess.PIPE, preexec_fn=ends_with_us(signal.SIGTERM))
        assert child.stdin is not None, "it is a pipe"
        child.stdin.write(told)
        child.stdin.close()
        code = child.wait()
        if not (code and left and RAY_WAS_LATE in log.read_bytes()[begun:].decode(errors="replace")):
            break
        kill_session(os.getsid(0), but=os.getpid())
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
