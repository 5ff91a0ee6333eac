"""The renderer stage as a Serve deployment: a thin shell over `acestep.dit.renderer`.

Audio is encoded and stored here, where it was made; only names, sizes and hashes travel on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from acestep.errors import AceStepError, Cancelled
from acestep.plan import Plan
from acestep.request import TASKS, SongRequest
from acestep.sizing.cost import CLIP_FRAMES
from acestep.song import Progress, Song
from deployments.config.args import RendererArgs, parse_args
from deployments.jobs import retry
from deployments.jobs.blobs import Storage
from deployments.stages.adapters import adapter_roots, entry, find, listing, with_adapters
from deployments.stages.inputs import local_files
from deployments.stages.live import LiveSongs
from deployments.stages.messages import failure
from deployments.stages.simulated import NOTICE, SimulatedRenderer
from deployments.stages.stage import StageDeployment
from deployments.stages.start import start_replica
from deployments.telemetry.logs import about
from deployments.telemetry.replica_metrics import ReplicaMeter
from deployments.telemetry.tracing import parts, span

if TYPE_CHECKING:
    from acestep.audio.live import LiveItem
    from acestep.dit.finish import Finish

log = logging.getLogger(__name__)
MAX_TOGETHER = 4  # more would keep songs from replicas that are free sooner


class RendererDeployment(StageDeployment):
    """Renders songs, encodes them and writes their files."""

    def __init__(self, args: dict[str, Any]) -> None:
        import acestep.dit.finish  # noqa: F401  # encoders: not for builders, which import this module, and not when the first song waits

        super().__init__()
        self.args = parse_args(RendererArgs, args, "dit")
        self.storage = Storage(self.args.files_url)
        self.live_songs = LiveSongs(self.storage, self.args.live_patience_s)
        self.lora_roots = adapter_roots(self.args.lora_roots)
        start = start_replica("render", self.args)
        began = time.monotonic()
        if self.args.engine == "simulated":
            model = str(start.model)
            self.engine = SimulatedRenderer(start.profile, model)
            facts: dict[str, Any] = {"model": model, "model_hash": None, "notice": NOTICE, "tasks": TASKS}
        else:
            from acestep.dit.renderer import Renderer

            checkpoint = start.checkpoint()
            assert start.settings.renderer is not None, "the role `render` has settings for it"
            self.engine = Renderer.load(checkpoint, start.settings.renderer)
            facts = {
                "model": checkpoint.name,
                "model_hash": checkpoint.hash,
                "notice": checkpoint.notice,
                "tasks": self.engine.info.tasks,
                "vae": checkpoint.vae,
                "latent_channels": self.engine.info.channels,
                "defaults": asdict(self.engine.info.defaults),
            }
        # Clips of 20 s fill a step's frame budget; a CPU has none and renders one song after another.
        together = min(MAX_TOGETHER, int(self.engine.stats().get("batch_frames", 0)) // CLIP_FRAMES)
        facts["together"] = max(1, together)
        self.info = start.info(**facts, load_s=time.monotonic() - began)
        self.meter = ReplicaMeter(self.engine.stats, start.device, self.info.load_s)
        log.info("renderer %s is ready on %s", self.info.model, self.info.device)

    async def render(
        self,
        job_id: str,
        request: dict[str, Any],
        plan: dict[str, Any],
        items: Sequence[int],
        timeout_s: float | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Render (some) items of a job and store their files. Streams progress, then the `Song`."""
        from acestep.dit.work import RenderWork

        about(job_id)
        try:
            parsed, made = SongRequest.model_validate(request), Plan.model_validate(plan)
            parsed = with_adapters(parsed, self.lora_roots)
            names = [*filter(None, [parsed.src_audio]), *parsed.reference_audio]
            indices = tuple(items)
            async with (
                local_files(self.storage, names) as paths,
                local_files(self.storage, parsed.latents, "latents") as latents,
                self.live_songs.open(job_id, parsed, () if latents else indices) as live,
                self._finishing(job_id, parsed, made, live) as finishing,
            ):
                source = paths.pop(0) if parsed.src_audio else None
                work = RenderWork(
                    parsed,
                    made,
                    indices,
                    src_audio=source,
                    reference_audio=tuple(paths),
                    on_audio=lambda index, first, samples, pcm: live[index].piece(samples, pcm),
                    on_item=finishing.add,
                    latents=dict(enumerate(latents)),
                )
                async for item in self.results(work, job_id, timeout_s):
                    if isinstance(item, Progress):
                        yield {"progress": item.model_dump()}
                        continue
                    took = item.timings
                    engine = {"conditions": took.conditions_s, "denoise": took.denoise_s, "decode": took.decode_s}
                    parts(engine, job_id=job_id)
                    # Said at once: the router sends the next song for the device, which is free from here on.
                    yield {"progress": Progress(stage="encoding", total=len(item.items)).model_dump()}
                    with span("encode", job_id=job_id, items=len(item.items)):
                        song: Song = await asyncio.to_thread(finishing.song, item)
                    log.info(
                        "job %s: %d item(s) rendered in %.2f s after %.2f s in the queue, encoded in %.2f s",
                        job_id,
                        len(item.items),
                        sum(engine.values()),
                        took.queued_s,
                        song.timings.encode_s,
                    )
                    yield {"result": song.model_dump(mode="json")}
            # Nobody waits for the end of this call; but a replica that is told to go stays until its calls have ended.
            await self.live_songs.heard(job_id, indices)
        except AceStepError as error:
            yield failure(error)

    async def codes(self, name: str) -> dict[str, Any]:
        """5 Hz audio codes of a stored file: one `{"result": ...}` or `{"error": ...}`."""
        try:
            async with local_files(self.storage, [name]) as (path,):
                ticket = self.engine.submit_codes(path)
                try:
                    codes: tuple[int, ...] = await asyncio.wrap_future(ticket.future)
                    return {"result": list(codes)}
                except asyncio.CancelledError:
                    self.engine.cancel(ticket)
                    raise
        except AceStepError as error:
            return failure(error)

    async def loras(self, name: str | None = None, whole: bool = False) -> dict[str, Any]:
        """What the LoRA folders hold, or the adapter of a name, read `whole` if asked: one `{"result": [...]}` or `{"error": ...}`."""
        target = self.engine.adapter_target
        if target is None:
            return {"result": []}
        try:
            if name is None:
                return {"result": await asyncio.to_thread(listing, self.lora_roots, target)}
            path = await asyncio.to_thread(find, name, self.lora_roots)
            return {"result": [await asyncio.to_thread(entry, name, path, target, whole=whole)]}
        except AceStepError as error:
            return failure(error)

    async def live(
        self, job_id: str, index: int, fmt: str, at: int, extra: bool | None = None, wait_s: float = 0.0
    ) -> dict[str, Any]:
        """A piece of what there is of a song that is made here; see `LiveSongs.read`."""
        return await self.live_songs.read(job_id, index, fmt, at, extra, wait_s)

    @contextlib.asynccontextmanager
    async def _finishing(
        self, job_id: str, request: SongRequest, plan: Plan, live: Mapping[int, LiveItem]
    ) -> AsyncIterator[Finish]:
        """Encodes and stores in threads, which are over with the context: whoever leaves early stops them before their next file."""
        from acestep.dit.finish import Finish, Maker

        left = threading.Event()

        def put(name: str, data: bytes) -> None:
            if left.is_set():
                raise Cancelled("nobody waits for it any more")
            retry.patiently(retry.FILES, f"storing {name}", lambda: self.storage.put(name, data), given_up=left.is_set)

        maker = Maker(
            self.info.model, self.info.model_hash, self.info.device, self.info.notice, self.info.vae or "official"
        )
        finishing = Finish(
            request, plan, maker, put, f"songs/{job_id}/", keep_latents=self.args.keep_latents, live=live
        )
        try:
            yield finishing
        finally:
            left.set()
            closing = asyncio.ensure_future(asyncio.to_thread(finishing.__exit__))
            await asyncio.wait({closing})
