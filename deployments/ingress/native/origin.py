"""Songs that go on from a song: what they have of it where nothing is said."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from acestep.errors import InvalidRequest
from acestep.request import MAX_PROMPT_CHARS, SongRequest
from acestep.song import Song, SongItem
from acestep.source_fields import Parent, SongName
from acestep.validation import validation_problems
from deployments.ingress.auth import Caller
from deployments.ingress.errors import Conflict, NotFound
from deployments.ingress.made import made_item, why_nothing
from deployments.ingress.native.submission import FROM, SongSubmission
from deployments.ingress.service import Service
from deployments.jobs.store import Job

# Of the song's request: how it sounds and is written, beside its words.
_KEPT = ("vocal_language", "lora", "model", "formats", "bitrate_kbps", "sample_rate")
# Found out for each request anew, or of a batch.
_OWN = {"source_s", "source_latents", "parents", "latents", "strict", "score", "ranked", "batch_size", "timestamps"}


async def song_of(
    service: Service, caller: Caller, submission: SongSubmission
) -> tuple[SongRequest, tuple[Parent, ...]]:
    """The request that a submission is, and the song that it makes again, where it does.

    Raises:
        NotFound, Conflict: the song that `from` names is none of the caller's, or there is none yet.
        InvalidRequest: what is said does not go with what that song has.
    """
    given = submission.given()
    if submission.origin is None:
        return SongRequest.model_validate(given), ()
    job, song, item = await origin_of(service, caller, submission.origin)
    if "task" in given:
        return _request(_words(job, song, item) | given), ()
    if given.get("retake_variance") and job.request.flow_edit_morph:
        raise InvalidRequest(
            "retake_variance: a song of flow edit has no noise to share; make it again with another seed",
            field="retake_variance",
        )
    parent = Parent(field="from", **submission.origin.model_dump())
    return _request(_again(job, song, item, given)), (parent,)


async def origin_of(service: Service, caller: Caller, name: SongName, field: str = FROM) -> tuple[Job, Song, SongItem]:
    """A finished song of the caller's.

    Raises:
        NotFound, Conflict: there is none, or not yet.
    """
    job = await service.job(name.job, caller)
    try:
        item = made_item(job, name.job, name.item, "audio")
        assert job is not None, "it has an item"
        assert job.result is not None
        if not item.files:
            raise Conflict(why_nothing(job, "audio"), state=job.state)
    except (NotFound, Conflict) as error:
        raise type(error)(f"{field}: {error.message}", **{**error.details, "field": field}) from None
    return job, job.result, item


def _words(job: Job, song: Song, item: SongItem) -> dict[str, Any]:
    """What a song is about, for something that is made of its sound."""
    request, metadata = job.request, song.plan.metadata_of(item.index)
    caption = metadata.caption if request.use_cot_caption else None
    kept = {name: getattr(request, name) for name in _KEPT}
    planned = {
        "bpm": metadata.bpm, "key_scale": metadata.keyscale, "time_signature": metadata.timesignature,
        "vocal_language": None if metadata.language == "unknown" else metadata.language,
    }  # fmt: skip
    return {
        **kept, "prompt": (caption or request.prompt)[:MAX_PROMPT_CHARS], "lyrics": request.lyrics,
        **{name: value for name, value in planned.items() if value is not None},
    }  # fmt: skip


def _again(job: Job, song: Song, item: SongItem, given: dict[str, Any]) -> dict[str, Any]:
    """All of the request that made a song alone."""
    values = job.request.model_dump(exclude=_OWN, exclude_unset=True)
    songs = given.get("batch_size", 1)
    metadata, codes = song.plan.metadata_of(item.index), song.plan.codes_of(item.index)
    if "prompt" in given:
        metadata = metadata.model_copy(update={"caption": None})
    made = {
        "metadata": metadata,
        "item_metadata": (),
        "codes": (codes,) if codes else None,
        "lm_seeds": (),
        "scores": (),
    }
    values |= {
        "seed": (item.seed,) * songs if songs > 1 else item.seed,
        "retake_seed": item.retake_seed,
        "plan": song.plan.model_copy(update=made),
        "audio_codes": None,
    }
    if item.lm_seed is not None:
        values["lm_seed"] = item.lm_seed
    if "retake_variance" in given:  # what was mixed in stays, and this comes on top
        if item.retake_seed is not None and job.request.retakes:
            before = {"seed": item.retake_seed, "variance": job.request.retake_variance}
            values["retaken"] = (*values.get("retaken", ()), before)
        values["retake_seed"] = None
    return values | given


def _request(values: dict[str, Any]) -> SongRequest:
    try:
        return SongRequest.model_validate(values)
    except ValidationError as error:
        problem = validation_problems(error.errors(include_url=False))[0]
        raise InvalidRequest(f"{problem['field']}: {problem['message']}", field=problem["field"]) from None
