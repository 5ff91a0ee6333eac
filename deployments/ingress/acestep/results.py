"""From a job to what `/query_result` says of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import quote

from acestep.lm.work import Sample
from acestep.plan import Adjustment, Metadata
from acestep.song import Song, SongItem
from deployments.dispatch.texts import ANSWER, PREPARE
from deployments.ingress.acestep.schemas import (
    AnalysisEntry,
    AnalysisMetas,
    CodesEntry,
    DoneEntry,
    FailedEntry,
    NoMetas,
    QueuedEntry,
    RunningEntry,
    SongEntry,
    TaskEntry,
    TaskState,
)
from deployments.ingress.links import public
from deployments.ingress.redact import redact
from deployments.ingress.service import Service
from deployments.jobs.store import QUEUED, SUCCEEDED, Job

ENVIRONMENT = "development"
NOT_KNOWN = "N/A"
UNKNOWN_TASK = "unknown task_id"
# Where each stage begins and ends on the way from 0 to 1.
_SPANS = {"planning": (0.05, 0.5), "rendering": (0.5, 0.85), "decoding": (0.85, 0.95), "encoding": (0.95, 0.99)}
_WORDS = {
    "planning": "Planning: {} of {} codes",
    "rendering": "Rendering: {} of {} steps",
    "decoding": "Decoding: {} of {} frames",
    "encoding": "Encoding",
}


def item_of(service: Service, task_id: str, job: Job | None, position: int) -> TaskState:
    """One entry of the answer: `result` is JSON text of a list, `status` 0, 1 or 2."""
    if job is None:
        if service.args.unknown_task == "queued":
            return TaskState(task_id=task_id, result="[]", status=0)
        return _item(task_id, [_failed(int(time.time()), UNKNOWN_TASK)], 2, UNKNOWN_TASK, UNKNOWN_TASK)
    created = int(job.created_at)
    if job.state == SUCCEEDED:
        return _item(job.id, _succeeded(service, job, created), 1, "done")
    if job.ended:
        error = error_text(job)
        return _item(job.id, [_failed(created, error)], 2, error, error)
    if job.state == QUEUED:
        entry = QueuedEntry(
            **_entry(0, created), prompt="", lyrics="", metas=NoMetas(), progress=0.0, stage="queued", error=None
        )
        return _item(job.id, [entry], 0, f"Queued at position {position}")
    progress, stage, text = _progress(job)
    running = RunningEntry.model_validate({**_entry(0, created), "progress": progress, "stage": stage})
    return _item(job.id, [running], 0, text)


def error_text(job: Job) -> str:
    """Why a job failed, in one line, as ACE-Step's server begins it."""
    error = job.error or {}
    if error.get("type") == "cancelled":
        return "cancelled"
    message = redact(" ".join(str(error.get("message") or "the job failed").split()))
    asked = next((step["ask"] for step in job.extra.get(PREPARE, ())), None)  # of the planner, before the song
    if asked and error.get("type") == "unavailable":
        return f"5Hz LM init failed: {message}"
    return f"{'create_sample' if asked == 'inspire' else 'Music generation'} failed: {message}"


def warnings_of(job: Job) -> list[Adjustment]:
    """What of a request was changed or had no effect, at submit and while it ran."""
    later = job.result.adjustments if job.result is not None else ()
    return [*job.adjustments, *(a for a in later if a not in job.adjustments)]


def audio_url(service: Service, path: str) -> str:
    """The relative URL of a stored file. On this machine alone, its `path` is the file's own."""
    local = service.storage.local_path(path)
    shown = str(local) if local is not None and service.loopback else path
    return public(f"/v1/audio?path={quote(shown, safe='')}")


def _item(
    task_id: str, result: Sequence[TaskEntry], status: Literal[0, 1, 2], text: str, error: str | None = None
) -> TaskState:
    shown = [entry.model_dump(mode="json", exclude_unset=True) for entry in result]
    told = {} if error is None else {"error": error}
    result_text = json.dumps(shown, ensure_ascii=False)
    return TaskState(task_id=task_id, result=result_text, status=status, progress_text=text, **told)


def _entry(status: int, created: int) -> dict[str, Any]:
    return {"file": "", "wave": "", "status": status, "create_time": created, "env": ENVIRONMENT}


def _failed(created: int, error: str) -> FailedEntry:
    return FailedEntry(**_entry(2, created), progress=0.0, stage="failed", error=error)


def _progress(job: Job) -> tuple[float, str, str]:
    if job.progress is None:
        return 0.01, "running", "Starting"
    low, high = _SPANS.get(job.progress.stage, (0.01, 0.05))
    if job.plan_pool is None:  # nothing is planned: rendering begins at once
        low = (low - 0.45) / 0.55 if low >= 0.5 else low
        high = (high - 0.45) / 0.55
    done, total = job.progress.done, job.progress.total
    share = done / total if total else 0.0
    text = _WORDS.get(job.progress.stage, "Running").format(done, total)
    return round(min(0.99, low + (high - low) * min(1.0, share)), 4), job.progress.stage, text


def _succeeded(service: Service, job: Job, created: int) -> list[TaskEntry]:
    kind = job.extra.get("compat", {}).get("kind", job.kind)
    if kind == "codes":
        return [CodesEntry(
            status_message="Audio Codes Extraction Success", audio_codes=code_text(job.extra[ANSWER]["codes"]),
            audio_paths=[], raw_audio_paths=[], first_audio_path=None, metas=NoMetas(),
        )]  # fmt: skip
    if kind == "understand":
        return [_analysis(job)]
    if kind == "plan":
        metadata = job.plan.metadata if job.plan else Metadata()
        model = (job.plan.model if job.plan else None) or ""
        return [DoneEntry(
            **_entry(1, created), **_texts(job, metadata), generation_info="Analysis Only Mode Complete", seed_value="",
            lm_model=model, dit_model="None (Analysis Only)", progress=1.0, stage="succeeded",
        )]  # fmt: skip
    assert job.result is not None, "a song that succeeded has a result"
    song = job.result
    seeds = ",".join(str(item.seed) for item in song.items)
    told = {"warnings": warnings} if (warnings := warnings_of(job)) else {}
    entries: list[TaskEntry] = []
    for item in song.items:
        url = audio_url(service, item.files[0].path) if item.files else ""  # one that was only listened to has none
        entry = SongEntry(
            **{**_entry(1, created), "file": url},
            **_texts(job, song.plan.metadata_of(item.index)),
            generation_info=_info(song, item),
            seed_value=seeds,
            lm_model=song.plan.model or "",
            dit_model=song.renderer,
            progress=1.0,
            stage="succeeded",
            url=url,
            seed=item.seed,
            lm_seed=item.lm_seed,
            retake_seed=item.retake_seed,
            **told,
        )
        entries.append(entry)
    return entries


def _texts(job: Job, metadata: Metadata) -> dict[str, Any]:
    said = job.extra.get("compat", {})
    request = job.request
    duration = metadata.duration or request.duration
    if job.result is not None:
        duration = job.result.items[0].duration
    return {
        "prompt": metadata.caption or request.prompt,
        "lyrics": request.lyrics,
        "metas": {
            "bpm": metadata.bpm or request.bpm or NOT_KNOWN,
            "duration": duration or NOT_KNOWN,
            "genres": NOT_KNOWN,
            "keyscale": metadata.keyscale or request.key_scale or NOT_KNOWN,
            "timesignature": metadata.timesignature or request.time_signature or NOT_KNOWN,
            "prompt": said.get("prompt", request.prompt),
            "lyrics": said.get("lyrics", request.lyrics),
        },
    }


def _info(song: Song, item: SongItem) -> str:
    """Markdown with where the time went, and what became of the level."""
    plan, render = song.plan.timings, song.timings
    rows = (
        ("Planning", plan.work_s),
        ("Conditions", render.conditions_s),
        ("Denoising", render.denoise_s),
        ("Decoding", render.decode_s),
        ("Encoding", render.encode_s),
    )
    lines = [f"- **{name}:** {seconds:.2f} s" for name, seconds in rows if seconds > 0]
    gains = (("Gain", item.gain_db), ("Gain inside the window", item.made_gain_db))
    lines += [f"- **{name}:** {gain:+.2f} dB" for name, gain in gains if gain is not None]
    return "\n".join(["## Generation", *lines, *([f"- {song.notice}"] if song.notice else [])])


def _analysis(job: Job) -> AnalysisEntry:
    answer = job.extra[ANSWER]
    sample = Sample.model_validate(answer["sample"])
    metas = AnalysisMetas(
        bpm=sample.bpm or NOT_KNOWN,
        keyscale=sample.keyscale or NOT_KNOWN,
        timesignature=sample.timesignature or NOT_KNOWN,
        duration=sample.duration or NOT_KNOWN,
    )
    return AnalysisEntry(
        **dict(metas),
        status_message="Full Hardware Analysis Success",
        genre=NOT_KNOWN,
        prompt=sample.caption or "",
        lyrics=sample.lyrics,
        language=sample.language or "unknown",
        metas=metas,
        audio_paths=[],
        audio_codes=code_text(answer["codes"]),
    )


def code_text(codes: list[int]) -> str:
    """Codes in the notation of ACE-Step's planner."""
    return "".join(f"<|audio_code_{code}|>" for code in codes)
