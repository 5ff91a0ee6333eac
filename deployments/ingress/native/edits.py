"""Verbs on finished songs. Each is a short way to say a task of `POST /v1/music` with `from`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Self

from fastapi import APIRouter, Body, Response
from pydantic import BeforeValidator, ConfigDict, Field, ModelWrapValidatorHandler, model_validator

from acestep import words
from acestep.errors import InvalidRequest
from acestep.request import MAX_BATCH, MAX_DURATION_S
from acestep.song import LATENT_FPS, SongItem
from acestep.source_fields import Seconds, SongName
from deployments.ingress.auth import Auth, Caller
from deployments.ingress.bodies import KeyFirst
from deployments.ingress.errors import PROBLEMS
from deployments.ingress.native import examples
from deployments.ingress.native.answers import JobView
from deployments.ingress.native.origin import origin_of
from deployments.ingress.native.songs import IdempotencyKey, JobId, Prefer, accept
from deployments.ingress.native.submission import FROM, JobOptions, SongSubmission
from deployments.ingress.service import Service, Svc

router = APIRouter(prefix="/v1", tags=["songs"], responses=PROBLEMS, route_class=KeyFirst)
_DECIDED = (
    "task", "src_audio", "origin", "plan", "audio_codes", "repainting_start", "repainting_end", "regions", "track_name", "track_classes",
    "global_caption", "retake_variance", "retake_seed", "retaken", "audio_cover_strength", "cover_noise_strength", "flow_edit_morph",
)  # fmt: skip


def _without_decided(schema: dict[str, Any], cls: type[Edit]) -> None:
    extra: Any = SongSubmission.model_config["json_schema_extra"]
    extra(schema)
    for name in (*_DECIDED, FROM, "duration"):
        if name not in cls.takes:
            schema["properties"].pop(name, None)


class Edit(SongSubmission):
    """An edit of a song. What is not said is as in that song."""

    model_config = ConfigDict(json_schema_extra=_without_decided)
    takes: ClassVar[
        tuple[str, ...]
    ] = ()  # fields of a song, of those that an edit decides, that it leaves to the caller
    own: ClassVar[tuple[str, ...]] = ()  # fields that a song has not

    item: int = Field(0, ge=0, lt=MAX_BATCH, description="Which of the job's songs, from 0.")

    @model_validator(mode="wrap")
    @classmethod
    def _decided(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        decided = [name for name in (*_DECIDED, FROM, "duration") if name not in cls.takes]
        said = next((name for name in decided if isinstance(data, dict) and name in data), None)
        if said is None:
            edit = read(data)
            if (said := next((name for name in decided if name in edit.model_fields_set), None)) is None:
                return edit
        raise ValueError(f"{said}: this edit decides it; leave it out")

    @abstractmethod
    def fields(self, item: SongItem) -> dict[str, Any]:
        """What it means for `POST /v1/music`, beside what is said of the song itself."""

    def submission(self, job_id: str, item: SongItem) -> SongSubmission:
        """The same as a request of `POST /v1/music`."""
        said = {name: value for name, value in self.given().items() if name not in ("item", *self.own)}
        options = self.model_dump(include=set(JobOptions.model_fields), exclude_unset=True)
        origin = {"job": job_id, "item": self.item}
        return SongSubmission.model_validate({**said, **options, FROM: origin, **self.fields(item)})


class Extend(Edit):
    """Go on before or after a song."""

    own = ("before", "after", "overlap")
    before: Seconds = Field(0.0, ge=0.0, le=MAX_DURATION_S, description="Seconds to add in front.")
    after: Seconds = Field(0.0, ge=0.0, le=MAX_DURATION_S, description="Seconds to add at the end.")
    overlap: Annotated[float, BeforeValidator(words.read_seconds)] = Field(
        0.2,
        ge=0.0,
        le=10.0,
        description="Seconds of the song beside what is added that are made anew, so that both join; 0: none.",
    )

    @model_validator(mode="after")
    def _somewhere(self) -> Extend:
        if not (self.before or self.after):
            raise ValueError("after: say how many seconds to add: after, before or both")
        return self

    def fields(self, item: SongItem) -> dict[str, Any]:
        end, regions = item.duration, []
        if (self.overlap * (bool(self.before) + bool(self.after))) > end:
            raise InvalidRequest(
                f"overlap: the song has {end:g} s only", field="overlap", asked=self.overlap, limit=end
            )
        if self.before:
            regions.append({"start": -self.before, "end": self.overlap})
        if self.after:
            regions.append({"start": end - self.overlap, "end": end + self.after})
        return {"task": "repaint", "regions": regions}


class Replace(Edit):
    """Make parts of a song anew."""

    takes = ("regions",)

    @model_validator(mode="after")
    def _some(self) -> Replace:
        if not self.regions:
            raise ValueError("regions: name at least one part of the song")
        for region in self.regions:
            if region.start < 0.0:
                raise ValueError(f"regions: {region} begins before the song; extend adds to it")
        return self

    def fields(self, item: SongItem) -> dict[str, Any]:
        for region in self.regions:
            last = max(region.start, region.end or 0.0)
            if last > item.duration + 1 / LATENT_FPS or region.start >= item.duration:
                raise InvalidRequest(
                    f"regions: {region} is beyond the end of the song, {item.duration:.3f} s; extend adds to it",
                    field="regions", asked=last, limit=item.duration,
                )  # fmt: skip
        ends = [None if r.end is None or r.end >= item.duration else r.end for r in self.regions]
        parts = [region.model_dump() | {"end": end} for region, end in zip(self.regions, ends, strict=True)]
        return {"task": "repaint", "regions": parts}


class Cover(Edit):
    """Make a song after another one, in another style."""

    takes = ("audio_cover_strength", "cover_noise_strength", "flow_edit_morph")

    def fields(self, item: SongItem) -> dict[str, Any]:
        return {"task": "cover"}


class Vary(Edit):
    """Make a song again, near to what it was."""

    takes = ("retake_seed",)
    own = ("strength",)
    strength: float = Field(
        ge=0.0, le=1.0, description="Share of other noise: 0 is the same song, 1 another one of the same plan."
    )

    def fields(self, item: SongItem) -> dict[str, Any]:
        return {"retake_variance": self.strength}


class Layer(Edit):
    """Add a track to a song, or several."""

    takes = ("track_name", "track_classes", "global_caption", "repainting_start", "repainting_end")

    @model_validator(mode="after")
    def _which(self) -> Layer:
        if (self.track_name is None) == (not self.track_classes):
            raise ValueError("track_name: name one track, or several with track_classes")
        return self

    def fields(self, item: SongItem) -> dict[str, Any]:
        return {"task": "lego" if self.track_name else "complete"}


class Stem(Edit):
    """Take a track out of a song."""

    takes = ("track_name",)

    @model_validator(mode="after")
    def _which(self) -> Stem:
        if self.track_name is None:
            raise ValueError("track_name: name the track to take out")
        return self

    def fields(self, item: SongItem) -> dict[str, Any]:
        return {"task": "extract"}


async def edit(
    service: Service, caller: Caller, job_id: str, asked: Edit, response: Response, key: str | None, prefer: str | None
) -> JobView:
    """Submit an edit of a caller's song.

    Raises:
        NotFound, Conflict: there is no such song, or not yet.
    """
    _, _, item = await origin_of(service, caller, SongName(job=job_id, item=asked.item), "job")
    return await accept(
        service, caller, asked.submission(job_id, item), response, kind="song", idempotency_key=key, prefer=prefer
    )


_ANSWERS: dict[int | str, dict[str, Any]] = {
    202: examples.JOB_202,
    200: {**examples.JOB_200, "model": JobView, "description": "It ended within `Prefer: wait=n`"},
}


@router.post("/jobs/{job_id}/extend", status_code=202, summary="Go on before or after a song", responses=_ANSWERS)
async def extend(
    job_id: JobId, asked: Annotated[Extend, Body(openapi_examples=examples.EXTEND)], response: Response, service: Svc, caller: Auth,
    idempotency_key: IdempotencyKey = None, prefer: Prefer = None,
) -> JobView:  # fmt: skip
    """Adds seconds in front, at the end or both. The song itself stays as it is, to the sample, but for `overlap`."""
    return await edit(service, caller, job_id, asked, response, idempotency_key, prefer)


@router.post("/jobs/{job_id}/replace", status_code=202, summary="Make parts of a song anew", responses=_ANSWERS)
async def replace(
    job_id: JobId, asked: Annotated[Replace, Body(openapi_examples=examples.REPLACE)], response: Response, service: Svc, caller: Auth,
    idempotency_key: IdempotencyKey = None, prefer: Prefer = None,
) -> JobView:  # fmt: skip
    """One region or several, each with words of its own if wanted. All outside of them stays as it is, to the sample."""
    return await edit(service, caller, job_id, asked, response, idempotency_key, prefer)


@router.post("/jobs/{job_id}/cover", status_code=202, summary="Make a song after another one", responses=_ANSWERS)
async def cover(
    job_id: JobId, asked: Annotated[Cover, Body(openapi_examples=examples.COVER)], response: Response, service: Svc, caller: Auth,
    idempotency_key: IdempotencyKey = None, prefer: Prefer = None,
) -> JobView:  # fmt: skip
    return await edit(service, caller, job_id, asked, response, idempotency_key, prefer)


@router.post(
    "/jobs/{job_id}/vary", status_code=202, summary="Make a song again, near to what it was", responses=_ANSWERS
)
async def vary(
    job_id: JobId, asked: Annotated[Vary, Body(openapi_examples=examples.VARY)], response: Response, service: Svc, caller: Auth,
    idempotency_key: IdempotencyKey = None, prefer: Prefer = None,
) -> JobView:  # fmt: skip
    """The same plan and seed, with a share of other noise. Of an edited song the edit is made again, on the same source."""
    return await edit(service, caller, job_id, asked, response, idempotency_key, prefer)


@router.post("/jobs/{job_id}/layer", status_code=202, summary="Add tracks to a song", responses=_ANSWERS)
async def layer(
    job_id: JobId, asked: Annotated[Layer, Body(openapi_examples=examples.LAYER)], response: Response, service: Svc, caller: Auth,
    idempotency_key: IdempotencyKey = None, prefer: Prefer = None,
) -> JobView:  # fmt: skip
    """`track_name`: one (task lego), in a part of the song if wanted; `track_classes`: several (task complete). Needs a base checkpoint."""
    return await edit(service, caller, job_id, asked, response, idempotency_key, prefer)


@router.post("/jobs/{job_id}/stem", status_code=202, summary="Take a track out of a song", responses=_ANSWERS)
async def stem(
    job_id: JobId, asked: Annotated[Stem, Body(openapi_examples=examples.STEM)], response: Response, service: Svc, caller: Auth,
    idempotency_key: IdempotencyKey = None, prefer: Prefer = None,
) -> JobView:  # fmt: skip
    """Task extract. Needs a base checkpoint."""
    return await edit(service, caller, job_id, asked, response, idempotency_key, prefer)
