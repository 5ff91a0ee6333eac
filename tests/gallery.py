"""The page with much to show: the HTTP application over a store of a thousand songs and a fleet of forty cards that is described, not started.

`python -m tests.gallery` serves it, to look at.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from acestep.audio.peaks import peaks_json
from acestep.errors import InvalidOutput, LimitExceeded, OutOfMemory
from acestep.gpu_config import get_gpu_config, get_limits
from acestep.plan import Metadata, Plan, PlanTimings
from acestep.request import SongRequest
from acestep.song import SIDECARS, AudioFile, Progress, RenderTimings, Sidecar, SidecarKind, Song, SongItem
from deployments.config.args import PlannerArgs, RendererArgs, RouterArgs
from deployments.fleet.watch import FleetView, Node, Pool
from deployments.jobs.blobs import Storage
from deployments.jobs.schema import jobs
from deployments.jobs.store import JobStore
from tests.api.conftest import fleet_view, served, service_of

SONGS = 1_000
IN_WORK = 3
SECONDS = 24.0  # of each one's sound
RATE = 48_000
WISHES = (
    ("Waltz for the Rain", "a slow waltz about rain, female voice, piano and strings", 84, "A minor", "en"),
    ("Night Bus", "lo-fi hip hop, dusty drums, a tape that wobbles, electric piano", 72, "F major", "en"),
    ("ليلة على النيل", "أغنية هادئة عن ليلة على ضفاف النيل، عود وناي", 90, "D minor", "ar"),
    ("Salt and Cedar", "folk song with fiddle and stomping feet, a choir in the last chorus", 118, "G major", "en"),
    ("Copper Wire", "industrial techno, metallic percussion, one bass note, no mercy", 138, "C minor", "en"),
    ("Kleine Laterne", "ein Wiegenlied mit Spieluhr, ganz leise", 66, "C major", "de"),
    (None, "big band swing, brass stabs, walking bass, a drummer who cannot sit still", 176, "B flat major", "en"),
    ("Aurora", "ambient, slow pads like northern lights, no drums", 60, "D major", "unknown"),
    (None, "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2, 100, "E minor", "de"),
    ("Cumbia del Sur", "cumbia with accordion and güiro, joyful, for dancing outside", 98, "A minor", "es"),
    ("真夜中の電車", "シティポップ、夜の電車、女性ボーカル、きらめくシンセ", 112, "E major", "ja"),
    ("Orbit", "synthwave, arpeggios, gated snare, driving at night", 104, "F sharp minor", "en"),
)  # fmt: skip
LYRICS = {
    "en": "[Verse]\nRain upon the window, count the silver lines\nEvery drop a dancer keeping perfect time\n\n"
    "[Chorus]\nOne two three, one two three, turn with me\nUntil the clouds have forgotten the sea",
    "ar": "[Verse]\nعلى ضفاف النيل نام القمر\nوالموج يحكي للنخيل السهر\n\n[Chorus]\nيا ليل طل ولا ترحل\nفي القلب أغنية لم تكتمل",
}  # fmt: skip


def sound(seed: int) -> npt.NDArray[np.float64]:
    """[2, samples]: chords that rise and fall, with a beat, so that a waveform has something to show."""
    draw = np.random.default_rng(seed)
    t = np.arange(int(SECONDS * RATE)) / RATE
    parts = np.repeat(draw.uniform(0.25, 0.95, 8), len(t) // 8 + 1)[: len(t)]
    beat = np.exp(-6 * ((t * draw.choice([1.0, 1.5, 2.0])) % 1.0)) * 0.6 + 0.4
    chord = sum(np.sin(2 * np.pi * f * t) for f in 110 * 2 ** (draw.choice(24, 4, replace=False) / 12)) / 4
    fade = np.clip(np.minimum(t, SECONDS - t) / 1.5, 0, 1)
    one = 0.9 * chord * parts * beat * fade
    return np.stack([one, np.roll(one, 400)])


def forty_cards() -> FleetView:
    """A fleet as `acestep config build` lays it out: planners on small cards, renderers on all, one tier without its node."""
    template = fleet_view()
    rendering, planning = template.pools[0].info or {}, template.pools[1].info or {}
    cards = {"tier4": (12, "NVIDIA GeForce RTX 3070", 8.0), "tier5": (8, "NVIDIA GeForce RTX 4070", 12.0), "tier6": (16, "NVIDIA GeForce RTX 4090", 24.0), "unlimited": (4, "NVIDIA H100 80GB HBM3", 80.0)}  # fmt: skip
    pools = []
    for tier, (count, device, memory) in cards.items():
        facts = {"tier": tier, "device": device, "memory_gib": memory}
        settings = {
            "dtype": {"value": "bfloat16", "reason": "compute capability 8.0 and above"},
            "offload": {"value": memory < 12, "reason": f"{memory:.0f} GiB"},
            "cuda_graphs": {"value": memory >= 12, "reason": "they take 0.7 GiB"},
        }
        config = get_gpu_config(tier)
        render = {**rendering, **facts, "settings": settings, "limits": asdict(get_limits(config, "render"))}
        pools.append(
            Pool(
                f"dit-{tier}", "render", RendererArgs(pool=f"dit-{tier}", tiers=(tier,), max_replicas=count), status="RUNNING",
                running=count - 1, target=count, starting=1, info=render,
            )
        )  # fmt: skip
    limits = asdict(get_limits(get_gpu_config("tier4"), "plan"))
    plan = {**planning, "tier": "tier4", "device": "NVIDIA GeForce RTX 3070", "memory_gib": 8.0, "limits": limits}
    pools.append(
        Pool(
            "lm-tier4",
            "plan",
            PlannerArgs(pool="lm-tier4", tiers=("tier4",), max_replicas=12),
            status="RUNNING",
            running=6,
            target=6,
            info=plan,
        )
    )
    pools.append(
        Pool(
            "dit-tier2",
            "render",
            RendererArgs(pool="dit-tier2", tiers=("tier2",)),
            status="RUNNING",
            starting=1,
            target=1,
        )
    )
    nodes = tuple(
        Node(f"rack{i // 8 + 1}-{i % 8 + 1}", {"acestep/gpu-tier": tier, "acestep/zone": "hall-b"}, 1.0, 16.0, f"http://10.0.0.{i + 2}:8080/metrics")
        for i, tier in enumerate(tier for tier, (count, *_) in cards.items() for _ in range(count))
    )  # fmt: skip
    return FleetView(
        pools=tuple(pools), nodes=nodes, at=time.time(), http_host="127.0.0.1", dashboard="http://127.0.0.1:8265"
    )


def fill(store: JobStore, storage: Storage, count: int = SONGS) -> None:
    """Songs of many days, a few that failed or were cancelled, some in work."""
    draw = random.Random(1)
    sounds = [_files(storage, i) for i in range(12)]
    now = time.time()
    rows = []
    for i in range(count):
        title, prompt, bpm, key, language = WISHES[i % len(WISHES)]
        versions = 4 if i % 7 == 1 else 1
        seeds = [draw.randrange(2**31) for _ in range(versions)]
        request = SongRequest(
            prompt=prompt, lyrics=LYRICS.get(language, ""), duration=SECONDS, batch_size=versions, seed=seeds, vocal_language=language, bpm=bpm, key_scale=key
        )  # fmt: skip
        at = now - 75 - (i * 97 if i < 60 else 60 * 97 + (i - 60) * 2400) - draw.uniform(0, 60)
        metadata = Metadata(bpm=bpm, caption=f"{prompt}, warm mix, wide stereo", duration=SECONDS, keyscale=key, language=language, timesignature="3" if i % len(WISHES) == 0 else "4")  # fmt: skip
        plan = Plan(metadata=metadata, model="acestep-5Hz-lm-1.7B", timings=PlanTimings(metadata_s=1.1, codes_s=2.3))
        row: dict[str, Any] = {
            "id": f"{i:08x}-0000-4000-8000-000000000000", "kind": "song", "state": "succeeded", "stage": "queued", "plan": plan.model_dump(mode="json"),
            "title": title, "favourite": i % 9 == 3, "request": request.model_dump(mode="json"), "adjustments": [], "extra": {}, "audio_s": SECONDS * versions,
            "created_at": at, "started_at": at + 1, "planned_at": at + 5, "finished_at": at + 9, "attempts": 1, "render_pool": "dit-tier6", "plan_pool": "lm-tier4",
            "result": None, "error": None, "progress": None,
        }  # fmt: skip
        if i % 11 == 5:
            error = (OutOfMemory("the card has too little memory for this song: 9.8 GiB are needed, 7.2 GiB are free; ask for a shorter one or fewer versions"), InvalidOutput("the planner's numbers are not finite: an adapter of this song (jazz.safetensors) does not fit"), LimitExceeded("duration: at most 600 seconds on this fleet"))[i // 11 % 3]  # fmt: skip
            row |= {"state": "failed", "error": error.to_dict()}
        elif i % 29 == 8:
            row |= {"state": "cancelled", "error": {"type": "cancelled", "message": "cancelled by the caller"}}
        else:
            items = tuple(_item(n, seed, *sounds[(i + n) % len(sounds)]) for n, seed in enumerate(seeds))
            song = Song(items=items, plan=plan, renderer="acestep-v15-turbo", device="NVIDIA GeForce RTX 4090", timings=RenderTimings(denoise_s=1.9, decode_s=0.8))  # fmt: skip
            row["result"] = song.model_dump(mode="json")
        rows.append(row)
    with store.engine.begin() as db:
        db.execute(jobs.insert(), rows)


def in_work(store: JobStore) -> None:
    """Two songs that are being made, and one that waits."""
    store.beat("gallery", 3600.0)
    for i, (_, prompt, *_) in enumerate(WISHES[3 : 3 + IN_WORK]):
        store.add(f"work{i}", SongRequest(prompt=prompt, duration=120, seed=1), est_plan_s=4.0, est_render_s=6.0, render_pool="dit-tier6", plan_pool="lm-tier4")  # fmt: skip
    for job_id, progress in (("work0", Progress(stage="rendering", done=5, total=8)), ("work1", Progress(stage="planning", done=310, total=600))):  # fmt: skip
        store.claim(job_id, "gallery")
        store.save_progress(job_id, "gallery", progress)


def _files(storage: Storage, number: int) -> tuple[AudioFile, Sidecar]:
    audio = sound(number)
    buffer = io.BytesIO()
    soundfile.write(buffer, audio.T, RATE, format="MP3")
    song, peaks = buffer.getvalue(), peaks_json(audio, RATE)
    kind: SidecarKind = "peaks"
    name, content_type = SIDECARS[kind]
    paths = f"songs/sound{number}/0-mp3.mp3", f"songs/sound{number}/0-{name}"
    for path, data in zip(paths, (song, peaks), strict=True):
        storage.put(path, data)
    return (
        AudioFile(format="mp3", content_type="audio/mpeg", path=paths[0], bytes=len(song), sha256="0" * 64),
        Sidecar(kind=kind, content_type=content_type, path=paths[1], bytes=len(peaks), sha256="0" * 64),
    )


def _item(index: int, seed: int, file: AudioFile, beside: Sidecar) -> SongItem:
    return SongItem(
        index=index,
        seed=seed,
        duration=SECONDS,
        samples=int(SECONDS * RATE),
        gain_db=-2.5,
        files=(file,),
        sidecars=(beside,),
    )


@contextlib.contextmanager
def gallery(home: Path, view: FleetView | None = None, songs: int = SONGS, **args: Any) -> Iterator[str]:
    """URL of the application over a store below `home`, in a thread of its own."""
    ready, done = threading.Event(), threading.Event()
    urls: list[str] = []
    parsed = RouterArgs(database_url=f"sqlite:///{home}/jobs.sqlite", files_url=str(home / "files"), **args)
    store = JobStore(parsed.database_url)
    fill(store, Storage(parsed.files_url), songs)
    in_work(store)
    store.close()

    async def serve() -> None:
        service = service_of(parsed, view or forty_cards())
        async with served(service) as url:
            urls.append(url)
            ready.set()
            await asyncio.to_thread(done.wait)
        service.store.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="gallery", daemon=True)
    thread.start()
    assert ready.wait(60), "the application did not start"
    try:
        yield urls[0]
    finally:
        done.set()
        thread.join(10)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("ACESTEP_HOME", folder)
        with gallery(Path(folder)) as url:
            print(url, flush=True)
            threading.Event().wait()
