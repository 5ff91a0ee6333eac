"""`Studio`: both stages in one process, for `acestep generate --local`. Same settings, same engines, same songs as the service."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from acestep.adjust import check_sources, over_plan
from acestep.audio.sources import measure
from acestep.checkpoints import resolve as resolve_checkpoint
from acestep.dit import checks
from acestep.dit.finish import Maker, finish
from acestep.dit.window import window_of
from acestep.errors import InvalidRequest
from acestep.hardware.devices import cap_process_memory
from acestep.plan import Plan
from acestep.request import Adjustment, SongRequest
from acestep.settings.resolve import Resolved
from acestep.settings.resolve import resolve as resolve_settings
from acestep.sizing.cost import needs_planner
from acestep.sizing.limits import apply_limits, unscored, without_planner
from acestep.song import SAMPLE_RATE, Progress, Song
from acestep.tasks import RULES

if TYPE_CHECKING:
    from acestep.dit.renderer import Renderer
    from acestep.lm.planner import Planner

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Made:
    """A song made here: the request as done, the result, and the files by (item, format of audio or kind)."""

    request: SongRequest
    song: Song
    adjustments: tuple[Adjustment, ...]
    files: dict[tuple[int, str], bytes] = field(repr=False)
    seconds: float = 0.0

    def view(self) -> dict[str, Any]:
        """In the words of the HTTP API's job."""
        song = self.song
        items = [
            {
                **item.model_dump(exclude={"files", "sidecars", "manifest"}),
                "planner_scores": scores.model_dump() if (scores := song.plan.scores_of(item.index)) else None,
                "audio": [f.model_dump(exclude={"path"}) for f in item.files],
                "files": [f.model_dump(exclude={"path"}) for f in item.sidecars],
            }
            for item in song.shown(ranked=self.request.ranked)
        ]
        timings = {"plan": song.plan.timings.model_dump(), "render": song.timings.model_dump()}
        return {
            "state": "succeeded",
            "request": self.request.model_dump(
                mode="json", exclude_defaults=True, exclude={"source_s", "source_latents"}
            ),
            "seeds": list(self.request.seeds),
            "warnings": [a.model_dump(mode="json") for a in self.adjustments],
            "plan": song.plan.model_dump(mode="json"),
            "result": {
                "items": items,
                "renderer": song.renderer,
                "device": song.device,
                "settings": song.settings,
                "timings": timings,
            },
            "notice": song.notice,
        }


class Studio:
    """Loads what a request needs, once. Use as a context manager.

    Args:
        overrides: Settings by option name (`acestep.settings.options`); they win over the environment.
    """

    def __init__(self, overrides: dict[str, Any] | None = None) -> None:
        self.settings: Resolved = resolve_settings("both", overrides)
        cap_process_memory(self.settings.device)
        self._planner: Planner | None = None
        self._renderer: Renderer | None = None

    def __enter__(self) -> Studio:
        return self

    def __exit__(self, *_: object) -> None:
        for stage in (self._planner, self._renderer):
            if stage is not None:
                stage.close()

    def make(self, request: SongRequest, on_progress: OnProgress | None = None) -> Made:
        """Plan, render and encode one request.

        Raises:
            AceStepError: as the service would answer.
        """
        began = time.monotonic()
        source = _existing("src_audio", request.src_audio)
        references = tuple(p for r in request.reference_audio if (p := _existing("reference_audio", r)))
        if source is not None:
            measured = measure(source, "src_audio")
            request = request.model_copy(
                update={"source_s": measured.seconds, "source_latents": measured.facts is not None}
            )
        lengths = [measure(path, "reference_audio").seconds for path in references]
        told = [*check_sources(request.source_s, lengths, strict=request.strict), *checks.notes(request)]
        request, changed = over_plan(request.with_seeds())
        if request.source_s is not None and RULES[request.task].window:
            window_of(request, round(request.source_s * SAMPLE_RATE))
        request, adjustments = apply_limits(request, self.settings.limits)
        adjustments = [*told, *changed, *unscored(request), *adjustments]
        plan = request.own_plan()
        if needs_planner(request):
            if self.settings.lm_enabled:
                plan = self._plan(request, on_progress)
                adjustments += plan.adjustments
            else:
                request, off = without_planner(request, self.settings.lm_reason)
                adjustments += off
        renderer = self.renderer()
        renderer.check(request)
        from acestep.dit.work import RenderWork

        parts: list[tuple[tuple[int, ...] | None, Plan]] = [(None, plan)]
        if plan.item_metadata:  # songs of their own: each is rendered by its own metadata
            parts = [((i,), plan.for_item(i)) for i in range(request.batch_size)]
        works = [RenderWork(request, p, items, src_audio=source, reference_audio=references) for items, p in parts]
        done = [renderer.submit(work, on_progress=on_progress).result() for work in works]
        rendered = replace(done[-1], items=tuple(item for part in done for item in part.items))
        files: dict[str, bytes] = {}
        info = renderer.info
        maker = Maker(info.name, info.hash, self.settings.device.name, info.notice, info.vae)
        song = finish(request, plan, rendered, maker, files.__setitem__)
        by_item = {(item.index, f.format): files[f.path] for item in song.items for f in item.files}
        by_item |= {(item.index, f.kind): files[f.path] for item in song.items for f in item.sidecars}
        song = song.model_copy(update={"plan": plan})
        told = [*adjustments, *(a for a in song.adjustments if a not in adjustments)]
        return Made(request, song, tuple(told), by_item, time.monotonic() - began)

    def _plan(self, request: SongRequest, on_progress: OnProgress | None) -> Plan:
        from acestep.lm.work import PlanWork

        ticket = self.planner().submit(PlanWork(request, self.settings.limits.max_duration), on_progress=on_progress)
        plan = ticket.result()
        assert isinstance(plan, Plan), "PlanWork gives a Plan"
        return plan

    def planner(self) -> Planner:
        if self._planner is None:
            from acestep.lm.planner import Planner

            assert self.settings.planner is not None, "lm_enabled implies settings for it"
            checkpoint = resolve_checkpoint(str(self.settings.planner_model), "planner")
            self._planner = Planner.load(
                checkpoint.path, self.settings.planner, name=checkpoint.name, model_hash=checkpoint.hash
            )
        return self._planner

    def renderer(self) -> Renderer:
        if self._renderer is None:
            from acestep.dit.renderer import Renderer

            assert self.settings.renderer is not None, "the role `both` renders"
            vae = self.settings.renderer.vae_model
            checkpoint = resolve_checkpoint(str(self.settings.renderer_model), "renderer", vae=vae)
            self._renderer = Renderer.load(checkpoint, self.settings.renderer)
        return self._renderer


def _existing(field: str, name: str | None) -> Path | None:
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.is_file():
        raise InvalidRequest(f"{field}: there is no file {path}", field=field)
    return path
