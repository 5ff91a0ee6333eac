"""The renderer stage as a Serve deployment: a thin shell over `acestep.dit.renderer`.

Audio is encoded and stored here, where it was made; only names, sizes and hashes travel on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from acestep.errors import AceStepError
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import AudioFile, Progress, Song, SongItem
from deployments.config import RendererArgs, parse_args
from deployments.replica import ReplicaInfo, start_replica
from deployments.storage import Storage
from deployments.streaming import ProgressMailbox, failure, follow

if TYPE_CHECKING:
    from acestep.dit.renderer import Rendered, RenderedItem

log = logging.getLogger(__name__)


class RendererDeployment:
    """Renders songs. One engine thread owns the device; the methods here only queue, wait and write files."""

    def __init__(self, args: dict[str, Any]) -> None:
        from acestep.dit.renderer import Renderer

        self.args = parse_args(RendererArgs, args, "dit")
        self.storage = Storage(self.args.files_url)
        start = start_replica("render", self.args)
        checkpoint = start.checkpoint()
        began = time.monotonic()
        self.renderer = Renderer.load(checkpoint, start.settings.renderer)
        self.info: ReplicaInfo = start.info(
            model=checkpoint.name, model_hash=checkpoint.hash, notice=checkpoint.notice,
            tasks=tuple(checkpoint.defaults.tasks), load_s=time.monotonic() - began,
        )  # fmt: skip
        log.info("renderer ready: %s", self.info)

    async def render(
        self,
        job_id: str,
        request: dict[str, Any],
        plan: dict[str, Any],
        items: Sequence[int] | None = None,
        priority: float = 0.0,
        timeout_s: float | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        """Render (some) items of a job and store their files. Streams progress, then the `Song`."""
        from acestep.dit.renderer import RenderWork

        mailbox = ProgressMailbox()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            parsed, made = SongRequest.model_validate(request), Plan.model_validate(plan)
            work = RenderWork(parsed, made, items=tuple(items) if items is not None else None)
            ticket = self.renderer.submit(work, priority=priority, deadline=deadline, on_progress=mailbox.put)
            async for item in follow(ticket, mailbox, self.renderer.cancel):
                if isinstance(item, Progress):
                    yield {"progress": item.model_dump()}
                    continue
                yield {"progress": Progress(stage="encoding", total=len(item.items)).model_dump()}
                song = await asyncio.to_thread(self._store, job_id, parsed, made, item)
                yield {"result": song.model_dump(mode="json")}
        except AceStepError as error:
            yield failure(error)

    def _store(self, job_id: str, request: SongRequest, plan: Plan, rendered: Rendered) -> Song:
        began = time.monotonic()
        items = tuple(self._store_item(job_id, request, plan, rendered, item) for item in rendered.items)
        timings = rendered.timings.model_copy(update={"encode_s": time.monotonic() - began})
        return Song(
            items=items, plan=plan, renderer=self.info.model, renderer_hash=self.info.model_hash,
            device=self.info.device, notice=self.info.notice, timings=timings, settings=rendered.settings,
        )  # fmt: skip

    def _store_item(
        self, job_id: str, request: SongRequest, plan: Plan, rendered: Rendered, item: RenderedItem
    ) -> SongItem:
        from acestep.audio.manifest import manifest, tags

        from acestep.audio.writing import content_type, encode, extension
        from acestep.song import SAMPLE_RATE

        facts = manifest(request, plan, item.index, item.seed, self.info.to_dict(), rendered.settings)
        files = []
        for fmt in request.formats:
            data = encode(item.audio, SAMPLE_RATE, fmt, bitrate_kbps=request.bitrate_kbps, tags=tags(facts))
            name = f"songs/{job_id}/{item.index}-{fmt}{extension(fmt)}"
            self.storage.put(name, data)
            files.append(
                AudioFile(
                    format=fmt,
                    content_type=content_type(fmt),
                    path=name,
                    bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                )  # fmt: skip
            )
        name = f"songs/{job_id}/{item.index}-manifest.json"
        self.storage.put(name, json.dumps(facts, indent=1, ensure_ascii=False).encode())
        samples = item.audio.shape[-1]
        return SongItem(
            index=item.index, seed=item.seed, duration=samples / SAMPLE_RATE, samples=samples, files=tuple(files),
            manifest=name,
        )  # fmt: skip

    async def describe(self) -> dict[str, Any]:
        return {**self.info.to_dict(), "stats": self.renderer.stats()}

    def check_health(self) -> None:
        if not self.renderer.alive:
            raise RuntimeError("the renderer's engine thread has ended")

    def __del__(self) -> None:
        if renderer := getattr(self, "renderer", None):
            renderer.close()
