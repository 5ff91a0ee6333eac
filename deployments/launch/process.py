"""`serve run` as a child: its lines into a log file, its end in order, and nothing left of its Ray."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path

import psutil

LOG_BYTES = 20 << 20
END_S = 30.0  # Serve hands running songs back within seconds
LEFT_S = 3.0  # for what Ray has not ended by itself
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ERROR = re.compile(r"(?<![\w.])[\w.]*(?:Error|Exception|Missing|Unavailable|Request|Permission|OutOfMemory): (.+)")
_FAILED = re.compile(r"Deploying app '([^']+)' failed|Failed to (?:build|deploy) app(?:lication)? '([^']+)'")
RAY_WAS_LATE = "The current node timed out during startup"
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class ServeRun:
    """One `serve run`, in a process session of its own: a terminal's Ctrl-C does not reach it, `interrupt` does.

    Args:
        on_line: Gets each line that it writes, too.
    """

    def __init__(
        self, config: Path, env: Mapping[str, str], log: Path, on_line: Callable[[str], None] | None = None
    ) -> None:
        self.log = log
        self.failed: str | None = None  # the application that could not be built
        self.last_error: str | None = None
        self.ray_was_late = False  # on a busy machine: the next try may do
        self._on_line = on_line
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        command = [str(Path(sys.executable).with_name("serve")), "run", str(config)]
        self._process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_as_a_child(),
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name="serve-log", daemon=True)
        self._reader.start()

    def code(self) -> int | None:
        """Exit status; None while it runs."""
        return self._process.poll()

    def interrupt(self) -> None:
        """What Ctrl-C would be to it: Serve shuts its applications down, Ray ends."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def end(self, patience: Callable[[], bool] = lambda: True) -> None:
        """Interrupt, wait, and end whatever is left of it.

        Args:
            patience: Whether to go on waiting; asked ten times a second.
        """
        self.interrupt()
        until = time.monotonic() + END_S
        while self.code() is None and time.monotonic() < until and patience():
            time.sleep(0.1)
        for kill, wait_s in ((psutil.Process.terminate, LEFT_S if patience() else 0.0), (psutil.Process.kill, LEFT_S)):
            left = list(self._session())
            for process in left:
                with contextlib.suppress(psutil.Error):
                    kill(process)
            psutil.wait_procs(left, timeout=wait_s)
        self._process.wait()
        self._reader.join(1.0)

    def _session(self) -> Iterator[psutil.Process]:
        """What runs in its session, itself included: Ray's processes."""
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    yield process

    def _read(self) -> None:
        handler = RotatingFileHandler(self.log, maxBytes=LOG_BYTES, backupCount=2, encoding="utf-8")
        assert self._process.stdout is not None, "it is a pipe"
        for data in self._process.stdout:
            line = _COLOUR.sub("", data.decode(errors="replace")).rstrip()
            handler.emit(logging.makeLogRecord({"msg": line.replace("%", "%%"), "args": ()}))
            self._notice(line)
            if self._on_line:
                self._on_line(line)
        handler.close()

    def _notice(self, line: str) -> None:
        if found := _ERROR.search(line):
            self.last_error = found[1]
        if found := _FAILED.search(line):
            self.failed = found[1] or found[2]
        self.ray_was_late |= RAY_WAS_LATE in line


def in_words(error: str) -> str:
    """`acestep.errors.ModelMissing: there is no ...` without the class in front."""
    return re.sub(r"^(?:\w+\.)*\w+(?:\(\w+\))?: ", "", error)


def _as_a_child() -> Callable[[], None]:
    """Run between fork and exec: it takes Ctrl-C even where its parent's parent ignored it, and ends when its parent is killed."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def begin() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if prctl:
            prctl(_DIES_WITH_PARENT, signal.SIGINT)

    return begin
