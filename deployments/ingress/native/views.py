"""How jobs and files look to callers of the native API."""

from __future__ import annotations

from typing import Any

from acestep.lineage import lineage_of
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import SongItem
from deployments.dispatch.texts import ANSWER
from deployments.ingress.links import audio_path, events_path, job_path, live_path, public, sidecar_path
from deployments.ingress.native.answers import Cost, FileView, JobShort, JobView, Placement, Quote, ShortAudio
from deployments.ingress.redact import public_error
from deployments.ingress.service import Service
from deployments.ingress.submit import Proposal
from deployments.jobs.store import CANCELLED, TERMINAL, Job
from deployments.jobs.uploads import FOLDER, FileRecord
from deployments.scheduling.line import Place

SHORT = 200  # characters of a text in a list


async def job_view(service: Service, job: Job, place: Place | None = None) -> JobView:
    """A job with where it stands, what it costs and, once done, signed URLs of its audio."""
    forecast = await service.forecast.of(job, place)
    view: dict[str, Any] = {
        "id": job.id,
        "kind": job.kind,
        "of": job.extra.get("of"),
        "title": job.title,
        "favourite": job.favourite,
        "labels": job.labels,
        "state": job.state,
        "stage": job.stage if not job.ended else job.state,
        "progress": job.progress if not job.ended else None,
        "position": forecast["position"],
        "eta_s": forecast["eta_s"],
        "cost": forecast["cost"],
        "usage": usage(job),
        "created_at": job.created_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
        "cancel_requested": job.cancel_requested or job.state == CANCELLED,
        "attempts": job.attempts,
        "placement": {"planner": job.plan_pool, "renderer": job.render_pool},
        "request": request_view(job.request),
        "lineage": lineage_of(job.request),
        "seeds": list(job.request.seeds),
        "warnings": list(job.adjustments),
        "plan": job.plan,
        "error": public_error(job.error) if job.ended else None,
        "links": {
            "self": public(job_path(job.id)),
            "events": public(service.signer.sign(events_path(job.id))),
            "live": _live(service, job),
        },
    }
    if song := job.result:
        items = [_item(service, job.id, item, song.plan) for item in song.shown(ranked=job.request.ranked)]
        view["result"] = {
            "items": items,
            "renderer": song.renderer,
            "renderer_hash": song.renderer_hash,
            "device": song.device,
            "settings": song.settings,
            "timings": {"plan": song.plan.timings, "render": song.timings},
        }
        view["warnings"] += [a for a in song.adjustments if a not in job.adjustments]
        view["notice"] = song.notice
    else:
        view["result"] = job.extra.get(ANSWER)
    return JobView.model_validate(view)


def _live(service: Service, job: Job) -> list[str]:
    items = job.request.batch_size if job.kind == "song" and (not job.ended or job.result) else 0
    return [public(service.signer.sign(live_path(job.id, index))) for index in range(items)]


def _item(service: Service, job_id: str, item: SongItem, plan: Plan) -> dict[str, Any]:
    def signed(path: str) -> str:
        return public(service.signer.sign(path))

    audio = [
        {**file.model_dump(exclude={"path"}), "url": signed(audio_path(job_id, item.index, file.format))}
        for file in item.files
    ]
    files = [
        {**file.model_dump(exclude={"path"}), "url": signed(sidecar_path(job_id, item.index, file.kind))}
        for file in item.sidecars
    ]
    own = item.model_dump(exclude={"files", "sidecars", "manifest"})
    return {**own, "planner_scores": plan.scores_of(item.index), "audio": audio, "files": files}


def short_view(service: Service, row: dict[str, Any], forecast: dict[str, Any]) -> JobShort:
    """A row of `jobs.songs.short_rows` as lists show it.

    Args:
        forecast: Of a job that has not ended: `position` and `eta_s`.
    """
    ended = row["state"] in TERMINAL
    meta, items = row["metadata"] or {}, row["items"] or []
    error = public_error(row["error"]) if row["error"] else None
    audio = [
        {
            "index": item["index"],
            "format": file["format"],
            "url": public(service.signer.sign(audio_path(row["id"], item["index"], file["format"]))),
        }
        for item in items
        for file in item["files"]
    ]
    return JobShort(
        **{name: row[name] for name in ("id", "kind", "state", "title", "favourite", "labels", "created_at", "finished_at")},
        stage=None if ended else row["stage"],
        progress=None if ended else row["progress"],
        position=forecast.get("position") or None,
        eta_s=forecast.get("eta_s"),
        prompt=(row["prompt"] or "")[:SHORT] or None,
        task=None if row["task"] == "text2music" else row["task"],
        duration=items[0]["duration"] if items else meta.get("duration"),
        bpm=meta.get("bpm"),
        key_scale=meta.get("keyscale"),
        cancel_requested=not ended and row["cancel_requested"],
        error=str(error["message"])[:SHORT] if error and row["state"] == "failed" else None,
        audio=[ShortAudio(**file) for file in audio],
    )  # fmt: skip


def quote_view(proposal: Proposal) -> Quote:
    """A request that was not submitted."""
    columns, decision = proposal.columns, proposal.decision
    eta_s = decision.eta_s if decision else None
    return Quote(
        position=proposal.place.position if proposal.place else None,
        wait_s=None if decision is None or eta_s is None else round(decision.wait_s, 1),
        eta_s=None if eta_s is None else round(eta_s, 1),
        cost=Cost(
            audio_s=proposal.audio_s,
            plan_s=round(columns.get("est_plan_s", 0.0), 3),
            render_s=round(columns.get("est_render_s", 0.0), 3),
        ),
        placement=Placement(planner=columns.get("plan_pool"), renderer=columns.get("render_pool")),
        request=request_view(proposal.request),
        warnings=list(proposal.adjustments),
    )


def usage(job: Job) -> dict[str, Any] | None:
    """What an ended job used: seconds of audio made, and seconds of its own on the devices by stage."""
    if not job.ended:
        return None
    plan = job.plan.timings if job.plan else None
    render = job.result.timings if job.result else None
    return {
        "audio_s": round(sum(i.duration for i in job.result.items if i.files), 3) if job.result else 0.0,
        "device_s": {
            "plan": round(plan.work_s, 3) if plan else 0.0,
            "render": round(render.conditions_s + render.denoise_s + render.decode_s, 3) if render else 0.0,
        },
        "total_s": round((job.finished_at or job.created_at) - job.created_at, 3),
    }


def request_view(request: SongRequest) -> dict[str, Any]:
    """A request as it can be sent again; stored source audio by its file id."""
    shown = request.model_dump(
        mode="json", exclude_defaults=True, exclude={"source_s", "source_latents", "parents", "latents"}
    )
    if "src_audio" in shown:
        shown["src_audio"] = shown["src_audio"].removeprefix(FOLDER)
    if "reference_audio" in shown:
        shown["reference_audio"] = [name.removeprefix(FOLDER) for name in shown["reference_audio"]]
    return shown


def file_view(record: FileRecord, keep_s: float, *, latents: bool) -> FileView:
    return FileView(
        id=record.id,
        kind="latent" if latents else "audio",
        name=record.name,
        bytes=record.bytes,
        sha256=record.sha256,
        duration=round(record.duration, 3),
        created_at=record.created_at,
        expires_at=record.created_at + keep_s,
    )
