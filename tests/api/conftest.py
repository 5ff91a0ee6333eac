"""The HTTP application over real parts: a job store, a file store, and a fleet that is described but not started.

Jobs stay queued unless a test plays the dispatcher, through the store as the real one does.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from acestep.audio.latent_file import LatentFacts, LatentFile, write_latent_file
from acestep.gpu_config import get_gpu_config, get_limits
from acestep.plan import Metadata, Plan, PlanTimings
from acestep.sizing.profiles import find
from acestep.song import SAMPLES_PER_FRAME, AudioFile, RenderTimings, Sidecar, Song, SongItem
from deployments.config.args import PlannerArgs, RendererArgs, RouterArgs
from deployments.dispatch import dispatcher as dispatch
from deployments.dispatch.dispatcher import Dispatcher
from deployments.dispatch.routing import Routing
from deployments.fleet.watch import Fleet, FleetView, Pool
from deployments.ingress.app import build_app
from deployments.ingress.service import Service
from deployments.jobs import retry
from deployments.jobs import store as job_store
from deployments.jobs.blobs import Storage
from deployments.jobs.store import Job, JobStore
from tests.engines import Engines

from .stages import Stage

WAV = b"RIFF" + bytes(40)


def latents_of(samples: int, channels: int = 64, **facts: Any) -> bytes:
    """A latent file."""
    frames = -(-samples // SAMPLES_PER_FRAME)
    said = LatentFacts(frames, channels, samples, **{"model": "acestep-v15-turbo", **facts})
    return write_latent_file(LatentFile(said, np.zeros((frames, channels), np.float16)))


def fleet_view(model: str = "acestep-v15-turbo", **view: Any) -> FleetView:
    """One planner and one renderer on a 24 GB card each."""
    tier = get_gpu_config("tier6")
    common = {"tier": "tier6", "notice": None, "profile": find(tier="tier6").model_dump(mode="json")}
    turbo = ["text2music", "cover", "cover-nofsq", "repaint"]
    planner = {**common, "model": "acestep-5Hz-lm-1.7B", "limits": asdict(get_limits(tier, "plan")), "capacity": 8}
    renderer = {**common, "model": model, "limits": asdict(get_limits(tier, "render")), "tasks": turbo}
    if "turbo" not in model:
        renderer["tasks"] = [*turbo, "extract", "lego", "complete"]
    pools = (
        Pool("dit", "render", RendererArgs(), status="RUNNING", running=1, info=renderer),
        Pool("lm", "plan", PlannerArgs(), status="RUNNING", running=1, info=planner),
    )
    return FleetView(**{"pools": pools, "at": time.time(), "http_host": "127.0.0.1", **view})


def existing(store: JobStore, job_id: str) -> Job:
    job = store.get(job_id)
    assert job is not None, f"there is no job {job_id}"
    return job


@dataclass
class Site:
    """One server's parts and a client that talks to it in process."""

    service: Service
    client: httpx.AsyncClient

    def job(self, job_id: str) -> Job:
        return existing(self.service.store, job_id)

    def run(self, job_id: str) -> Job:
        """Claim a job as a dispatcher does."""
        self.service.store.beat("test", 60.0)
        job = self.service.store.claim(job_id, "test")
        assert job is not None, "the job cannot be claimed"
        return job

    def succeed(self, job_id: str, data: bytes = WAV, caption: str = "a caption of the planner") -> Job:
        """Carry a job to its end, with files in the store."""
        job = self.job(job_id) if self.job(job_id).state == "running" else self.run(job_id)
        store, request = self.service.store, job.request
        metadata = Metadata(bpm=92, caption=caption, duration=30.0, keyscale="A minor", language="en")
        plan = Plan(metadata=metadata, model="tiny-lm", timings=PlanTimings(metadata_s=1.0, codes_s=2.0))
        store.save_plan(job_id, "test", plan)
        items = []
        for index, seed in enumerate(request.seeds):
            files = []
            for fmt in request.formats:
                kind = {"mp3": "audio/mpeg", "flac": "audio/flac", "opus": "audio/ogg", "aac": "audio/mp4"}.get(
                    fmt, "audio/wav"
                )
                extension = "m4a" if fmt == "aac" else "wav" if fmt.startswith("wav") else fmt
                path = f"songs/{job_id}/{index}-{fmt}.{extension}"
                self.service.storage.put(path, data)
                files.append(AudioFile(format=fmt, content_type=kind, path=path, bytes=len(data), sha256="0" * 64))
            path = f"songs/{job_id}/{index}-latent.safetensors"
            latents = latents_of(1_440_000)
            self.service.storage.put(path, latents)
            beside = Sidecar(
                kind="latent", content_type="application/octet-stream", path=path, bytes=len(latents), sha256="0" * 64
            )
            items.append(
                SongItem(
                    index=index, seed=seed, duration=30.0, samples=1_440_000, gain_db=-2.5, files=tuple(files), sidecars=(beside,)
                )
            )  # fmt: skip
        song = Song(items=tuple(items), plan=plan, renderer="acestep-v15-turbo", timings=RenderTimings(denoise_s=0.5))
        store.succeed(job_id, "test", song)
        return self.job(job_id)


def service_of(args: RouterArgs, view: FleetView) -> Service:
    """A router's parts over a fleet that is described."""
    store, fleet, routing = JobStore(args.database_url), Fleet(), Routing()
    fleet.view = view
    dispatcher = Dispatcher(store, fleet, routing, lease_s=args.lease_s)
    return Service(args, store, Storage(args.files_url), fleet, routing, dispatcher)


Build = Callable[..., Site]


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture
async def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engines: Engines) -> AsyncIterator[Build]:
    """Makes sites: `build(view=..., **router_args)`."""
    monkeypatch.setenv("ACESTEP_HOME", str(tmp_path))
    monkeypatch.delenv("ACESTEP_API_KEY", raising=False)
    sites: list[Site] = []

    def make(view: FleetView | None = None, **args: Any) -> Site:
        service = service_of(RouterArgs(**args), fleet_view() if view is None else view)
        transport = httpx.ASGITransport(build_app(service), raise_app_exceptions=False)
        sites.append(Site(service, httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")))
        return sites[-1]

    with engines.lend() as opened:
        monkeypatch.setattr(job_store, "open_database", opened)
        yield make
        for site in sites:
            await site.client.aclose()
            site.service.store.close()


@pytest.fixture
def site(build: Build) -> Site:
    return build()


@pytest.fixture
def stage(site: Site, monkeypatch: pytest.MonkeyPatch) -> Stage:
    made = Stage()
    monkeypatch.setattr(site.service.fleet, "handle", made.handle)
    monkeypatch.setattr(retry, "STAGE", retry.Policy(first_s=0.05))
    monkeypatch.setattr(dispatch, "POLL_S", 0.05)
    return made


@pytest.fixture(scope="session")
def wav() -> bytes:
    """One second of a real 440 Hz tone."""
    import io

    import numpy as np
    import soundfile

    buffer = io.BytesIO()
    tone = 0.2 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    soundfile.write(buffer, np.stack([tone, tone], 1), 48_000, format="WAV")
    return buffer.getvalue()


@contextlib.asynccontextmanager
async def served(service: Service) -> AsyncIterator[str]:
    """URL of an application behind a real HTTP server."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(build_app(service), log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving


@pytest.fixture
async def live(site: Site) -> AsyncIterator[str]:
    """URL of the site's application behind a real HTTP server."""
    async with served(site.service) as url:
        yield url
