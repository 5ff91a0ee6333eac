"""Eight clients at once, song after song: no error, and no growth after the warm-up."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from acestep.cli.client import Client
from tests.server import Server

pytestmark = pytest.mark.e2e
CLIENTS, WARM_UP, SONGS = 8, 32, 96
MIB = 1 << 20


def resident(server: Server) -> dict[str, int]:
    """Resident bytes of this server's processes, by title."""
    found: Counter[str] = Counter()
    for pid in server.pids(""):
        try:
            process = psutil.Process(pid)
            found[process.cmdline()[0].strip()] += process.memory_info().rss
        except (psutil.Error, IndexError):
            continue  # it ended meanwhile
    del found["ray::IDLE"]  # Ray has more or fewer of them as it likes
    return dict(found)


def test_eight_clients_make_a_hundred_songs(server: Server) -> None:
    def make(number: int) -> None:
        with Client(server.url) as client:
            fmt = "wav" if number % 8 else "mp3"  # which costs half of a song's processor time
            song = {"prompt": f"song {number}", "duration": 10, "steps": 2, "formats": [fmt]}
            job = client.wait(client.submit(song)["id"], poll_s=1.0)  # eight who ask more often keep a core busy
            assert client.file(job["result"]["items"][0]["audio"][0]["url"])

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(make, range(WARM_UP)))
        warm = resident(server)
        list(clients.map(make, range(SONGS)))
        end = resident(server)
    grown = {k: round((end[k] - v) / MIB, 1) for k, v in warm.items() if k in end and end[k] - v > 0.1 * v + 32 * MIB}
    print(f"MiB before {sum(warm.values()) / MIB:.0f}, after {sum(end.values()) / MIB:.0f}")
    assert grown == {}
