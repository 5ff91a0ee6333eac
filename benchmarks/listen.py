"""Listening while a song is made: how soon, at what cost, and whether it is the file. Ratios in one run.

    python -m benchmarks.listen [--quick] [--json] [--only first,encode,idle,same,memory]

first   seconds to the first sound of a song as MP3, divided by those to its whole file; the mid-size random model decodes for seconds on a CPU
encode  wall of encoding eight items in three formats, divided by its CPU seconds over the cores
idle    the part of the time in which the engine does nothing, from the begin of the first of two queued songs to the end of the second
same    whether what a listener is sent at the final level is the file, byte for byte
memory  what a router and the proxies grow by with many listeners of one long song, in MB, and the longest that anybody else waited meanwhile;
        the engines are simulated
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch

from acestep.audio.live import LiveItem, Sound
from acestep.checkpoints.published import variant_defaults
from acestep.dit.finish import Finish, Maker
from acestep.dit.renderer import Renderer
from acestep.dit.work import Rendered, RenderedItem, RenderWork
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import RenderTimings
from acestep.stage_settings import RendererSettings
from benchmarks.dit import machine
from benchmarks.models import build
from benchmarks.service import simulated_service

MARKS = {"first": 0.5, "encode": 1.3, "idle": 0.03, "memory": 200.0}
MAKER = Maker("benchmark", None, "cpu", None)


class Listened:
    """One song, its files, and one who listens to its first item.

    Args:
        patience_s: As a renderer's `live_patience_s`.
    """

    def __init__(self, request: SongRequest, fmt: Any, patience_s: float) -> None:
        self.request, self.fmt = request.with_seeds(), fmt
        self.changed = threading.Event()
        self.item = LiveItem(self.request, patience_s, self.changed.set)
        self.files: dict[str, bytes] = {}
        self.heard = b""
        self.first_s = self.heard_s = self.made_s = 0.0

    def make(self, renderer: Renderer) -> Listened:
        began = time.monotonic()
        listening = threading.Thread(target=self._listen, args=(began,))
        listening.start()
        with Finish(self.request, Plan(), MAKER, self._put, live={0: self.item}) as finishing:
            work = RenderWork(
                self.request,
                on_audio=lambda _, first, samples, pcm: self.item.piece(samples, pcm),
                on_item=finishing.add,
            )
            finishing.song(renderer.submit(work).result())
        self.made_s = time.monotonic() - began
        listening.join()
        return self

    def _put(self, name: str, data: bytes) -> None:
        self.files[name] = data

    def _listen(self, began: float) -> None:
        sound: Sound | None = None
        while not (sound and sound.closed and len(self.heard) == sound.length):
            self.changed.wait(0.05)
            self.changed.clear()
            if sound is None and (sound := self.item.sound(self.fmt)) is None:
                continue
            while len(self.heard) < sound.length:
                at = len(self.heard)
                name = sound.stored
                self.heard += self.files[name][at:] if name else sound.read(at, 1 << 18)
                self.first_s = self.first_s or time.monotonic() - began
        self.final = sound.final
        self.heard_s = time.monotonic() - began


@contextmanager
def mid_size() -> Iterator[Renderer]:
    parts = build("mid", torch.device("cpu"), torch.float32)
    settings = RendererSettings(device="cpu", dtype="float32", attention="sdpa")
    renderer = Renderer(parts, settings, name="benchmark", defaults=variant_defaults(parts.is_turbo))
    try:
        renderer.submit(RenderWork(SongRequest(prompt="p", duration=10, seed=1))).result()
        yield renderer
    finally:
        renderer.close()


def first(renderer: Renderer, seconds: float) -> dict[str, Any]:
    song = Listened(SongRequest(prompt="p", duration=seconds, seed=2, formats=("mp3",)), "mp3", 1.0).make(renderer)
    return {
        "seconds": seconds, "level": "final" if song.final else "provisional", "first_s": round(song.first_s, 2),
        "whole_s": round(song.made_s, 2), "ratio": round(song.first_s / song.made_s, 3),
    }  # fmt: skip


def same(renderer: Renderer) -> dict[str, Any]:
    found = {}
    for fmt in ("mp3", "opus", "wav"):
        song = Listened(SongRequest(prompt="p", duration=12, seed=3, formats=(fmt,)), fmt, 600.0).make(renderer)
        found[fmt] = song.heard == next(data for name, data in song.files.items() if name.startswith(f"0-{fmt}."))
    return found


def encode(seconds: float) -> dict[str, Any]:
    request = SongRequest(prompt="p", duration=seconds, seed=1, batch_size=8, formats=("flac", "mp3", "opus"))
    noise = [0.1 * torch.randn(2, round(seconds * 48_000)) for _ in range(8)]
    rendered = Rendered(tuple(RenderedItem(i, i, a) for i, a in enumerate(noise)), RenderTimings(), {})
    wall, cpu = time.monotonic(), time.process_time()
    with Finish(request.with_seeds(), Plan(), MAKER, lambda *_: None) as finishing:
        finishing.song(rendered)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    cores = len(os.sched_getaffinity(0))
    return {"seconds": seconds, "wall_s": round(wall, 2), "cpu_s": round(cpu, 2), "cores": cores, "ratio": round(wall * cores / cpu, 2)}  # fmt: skip


def idle(renderer: Renderer, seconds: float) -> dict[str, Any]:
    """Both songs are there at once; the first one is encoded while the second one is rendered."""
    songs = [SongRequest(prompt="p", duration=seconds, seed=s, formats=("mp3",)).with_seeds() for s in (5, 6)]
    busy, began = renderer.stats()["busy_s"], time.monotonic()

    def one(request: SongRequest) -> float:
        with Finish(request, Plan(), MAKER, lambda *_: None) as finishing:
            rendered = renderer.submit(RenderWork(request, on_item=finishing.add)).result()
            ended = time.monotonic()
            finishing.song(rendered)
            return ended

    with ThreadPoolExecutor(2) as pool:
        ended = max(pool.map(one, songs))
    span = ended - began
    return {"seconds": seconds, "ratio": round(max(0.0, 1 - (renderer.stats()["busy_s"] - busy) / span), 4)}


def memory(listeners: int, seconds: float) -> dict[str, Any]:
    """Half of the listeners read as fast as they can, half no faster than the sound plays."""
    # A card of this size makes songs of that length.
    with simulated_service({"live_patience_s": 600.0}, also={"MAX_CUDA_VRAM": "80"}) as url:
        song = {"prompt": "a song", "duration": seconds, "thinking": False, "format": "mp3"}
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=url, timeout=600, limits=limits) as http, ThreadPoolExecutor(listeners + 1) as pool:
            http.post("/v1/music", json={**song, "duration": 10}, headers={"Prefer": "wait=50"})
            before = _resident()
            peak, over = dict(before), threading.Event()

            def watch() -> None:
                while not over.wait(0.25):
                    for name, size in _resident().items():
                        peak[name] = max(peak.get(name, 0.0), size)

            watching = threading.Thread(target=watch)
            watching.start()
            job = http.post("/v1/music", json=song).json()
            assert job["request"]["duration"] == seconds, job["warnings"]
            asking = pool.submit(_asked, url, over)

            def listen(number: int) -> int:
                heard = 0
                with http.stream("GET", job["links"]["live"][0]) as answer:
                    for chunk in answer.iter_raw(24_000):
                        heard += len(chunk)
                        if number % 2 and heard < 20 * 24_000:
                            time.sleep(1.0)
                return heard if answer.status_code == 200 else answer.status_code

            heard = list(pool.map(listen, range(listeners)))
            over.set()
            watching.join()
        return {
            "listeners": listeners, "seconds": seconds, "bytes_each": sorted(set(heard)), "others_waited_s": asking.result(),
            **{f"{name}_grew_mb": round(peak[name] - before.get(name, 0.0), 1) for name in ("router", "proxy")},
        }  # fmt: skip


def _asked(url: str, over: threading.Event) -> dict[str, float]:
    """The longest that anybody else waited meanwhile."""
    longest: dict[str, float] = {}
    with httpx.Client(base_url=url, timeout=600) as http:
        while not over.is_set():
            job: dict[str, Any] = {}
            for name in ("livez", "submit", "events"):
                began = time.monotonic()
                if name == "livez":
                    http.get("/livez").raise_for_status()
                elif name == "submit":
                    job = http.post("/v1/music", json={"prompt": "another", "duration": 10}).json()
                else:
                    with http.stream("GET", job["links"]["events"]) as events:
                        next(events.iter_lines())
                longest[name] = max(longest.get(name, 0.0), round(time.monotonic() - began, 2))
            http.delete(f"/v1/jobs/{job['id']}")
            over.wait(1.0)
    return longest


def _resident() -> dict[str, float]:
    """MB of what is not shared, of the routers and of the proxies among this process' descendants."""
    found = {"router": 0.0, "proxy": 0.0}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            name = (
                "router"
                if title.startswith("ray::ServeReplica:router")
                else "proxy"
                if title.startswith("ray::ProxyActor")
                else None
            )
            if name:
                fields = (folder / "status").read_text().splitlines()
                found[name] += sum(int(line.split()[1]) for line in fields if line.startswith("RssAnon")) / 1000
        except OSError:
            continue  # gone meanwhile
    return found


def _load() -> float:
    return round(os.getloadavg()[0], 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter songs and fewer listeners")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--listeners", type=int, help="of `memory`; left out: 100")
    parser.add_argument("--only", default="first,encode,idle,same,memory", help="some of them, with commas between")
    args = parser.parse_args(argv)
    wanted, quick = args.only.split(","), args.quick
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "marks": MARKS, "load": [_load()]}
    if {"first", "idle", "same"} & set(wanted):
        with mid_size() as renderer:
            if "first" in wanted:
                report["first"] = first(renderer, 60.0 if quick else 180.0)
            if "idle" in wanted:
                report["idle"] = idle(renderer, 20.0 if quick else 60.0)
            if "same" in wanted:
                report["same"] = same(renderer)
    if "encode" in wanted:
        report["encode"] = encode(10.0 if quick else 60.0)
    if "memory" in wanted:
        report["memory"] = memory(args.listeners or (20 if quick else 100), 60.0 if quick else 600.0)
    report["load"].append(_load())  # of the last minute, by this program too
    print(json.dumps(report) if args.json else "\n".join(f"{name}: {value}" for name, value in report.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
