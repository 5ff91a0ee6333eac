"""Eight clients at once for two minutes: no error, and no growth after the warm-up."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from acestep.cli.client import Client
from tests.server import Server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
CLIENTS, SECONDS, WARM_UP_S = 8, 120.0, 45.0
MIB = 1 << 20


def resident(server: Server) -> dict[str, int]:
    """Resident bytes of this server's processes, by title."""
    assert server.process is not None
    found: Counter[str] = Counter()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
            if session == server.process.pid:
                process = psutil.Process(int(folder.name))
                found[process.cmdline()[0]] += process.memory_info().rss
        except (OSError, ValueError, IndexError, psutil.Error):
            continue
    return dict(found)


def test_eight_clients_for_two_minutes() -> None:
    failures: list[str] = []
    done = Counter[int]()
    with Server() as server:
        stop = time.monotonic() + SECONDS

        def work(number: int) -> None:
            with Client(server.url) as client:
                while time.monotonic() < stop:
                    try:
                        job = client.submit(
                            {"prompt": f"song {number}", "duration": 10, "steps": 2, "formats": ["mp3"]}
                        )
                        job = client.wait(job["id"])
                        assert client.file(job["result"]["items"][0]["audio"][0]["url"])
                        done[number] += 1
                    except Exception as error:
                        failures.append(repr(error))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(CLIENTS)]
        for thread in threads:
            thread.start()
        time.sleep(WARM_UP_S)
        warm = resident(server)
        for thread in threads:
            thread.join()
        end = resident(server)
    assert failures == []
    assert len(done) == CLIENTS
    grown = {k: round((end[k] - v) / MIB, 1) for k, v in warm.items() if k in end and end[k] - v > 0.1 * v + 32 * MIB}
    print(f"{sum(done.values())} songs; MiB before {sum(warm.values()) / MIB:.0f}, after {sum(end.values()) / MIB:.0f}")
    assert grown == {}
