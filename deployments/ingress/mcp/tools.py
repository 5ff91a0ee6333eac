"""The native API as tools: each takes what a route takes and answers with the route's model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, create_model

from acestep.errors import InvalidRequest
from deployments.ingress.auth import Caller
from deployments.ingress.errors import Conflict
from deployments.ingress.links import audio_path, live_path, public
from deployments.ingress.made import why_nothing
from deployments.ingress.mcp.progress import Report, wait
from deployments.ingress.native import cluster, edits, library
from deployments.ingress.native.answers import Answer, JobView, ShortAudio, ShortPage, State
from deployments.ingress.native.cluster import Cluster
from deployments.ingress.native.songs import JobId, accept, existing
from deployments.ingress.native.submission import SongSubmission
from deployments.ingress.native.views import job_view
from deployments.ingress.service import Service

WAIT_S = 30.0
EDITS: dict[str, type[edits.Edit]] = {
    "extend": edits.Extend, "replace": edits.Replace, "cover": edits.Cover, "vary": edits.Vary, "layer": edits.Layer, "stem": edits.Stem,
}  # fmt: skip
# Of the many fields of a song those that are shown to a model in every conversation; all others are taken, too.
SHOWN = (
    "prompt", "lyrics", "instrumental", "duration", "bpm", "key_scale", "time_signature", "vocal_language", "seed", "batch_size", "formats",
    "thinking", "steps", "deadline_s",
)  # fmt: skip
SONG = (*SHOWN, "plan", "from", "task", "src_audio", "reference_audio", "score", "timestamps")
MORE = "All other fields of POST /v1/music are taken, too: resource acestep://schemas/song has them."
PLAN = "The `plan` that a job had, with whatever was changed of it: nothing of it is planned again."


@dataclass(frozen=True)
class Call:
    """Who calls a tool, and how to tell of progress."""

    service: Service
    caller: Caller
    report: Report


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        takes: JSON Schema of its arguments.
        gives: JSON Schema of its answer.
        reads_only: It changes nothing.
        destroys: It ends or takes away something.
    """

    name: str
    title: str
    description: str
    takes: dict[str, Any]
    gives: dict[str, Any]
    run: Callable[[Call, dict[str, Any]], Awaitable[BaseModel]]
    reads_only: bool = False
    destroys: bool = False


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Submitting(_Arguments):
    wait_s: float = Field(
        0.0, ge=0.0, le=600.0, description="Answer when the job has ended, or after so many seconds; 0: at once."
    )
    idempotency_key: str | None = Field(
        None, description="The same key and arguments again give the same job: for calls that are tried again."
    )


class Which(_Arguments):
    job: JobId


class Editing(Which):
    edit: Literal["extend", "replace", "cover", "vary", "layer", "stem"] = Field(
        description="extend adds seconds `before` or `after`; replace makes `regions` anew; cover makes a song after it in the style of "
        "`prompt`; vary makes it again with `strength` of other noise; layer adds the track `track_name`, stem takes it out (base "
        "checkpoints only)."
    )


class Waiting(Which):
    wait_s: float = Field(
        WAIT_S, ge=0.0, le=600.0, description="Seconds, at most what the server allows for one call; call again."
    )


class Playing(Which):
    item: int | None = Field(None, ge=0, description="Which of its songs, from 0; null: all.")


class PlayLinks(Answer):
    """Where a job's songs can be heard, without a key, until the links expire."""

    state: State = Field(description="As in the job's view.")
    audio: list[ShortAudio] = Field(description="Files of finished songs.")
    live: list[str] = Field(description="Sound of songs while they are made: plays as soon as there is some.")


# As of GET /v1/jobs, whose parameters they are.
Listing: type[BaseModel] = create_model(
    "Listing",
    __base__=_Arguments,
    **{
        name: (get_type_hints(library.list_jobs, include_extras=True)[name], parameter.default)
        for name, parameter in inspect.signature(library.list_jobs).parameters.items()
        if name not in ("service", "caller", "view")
    },  # type: ignore[call-overload]
)


async def make(call: Call, arguments: dict[str, Any]) -> JobView:
    return await _submit(call, arguments, "song")


async def plan(call: Call, arguments: dict[str, Any]) -> JobView:
    return await _submit(call, arguments, "plan")


async def _submit(call: Call, arguments: dict[str, Any], kind: str) -> JobView:
    how, said = _taken(Submitting, arguments)
    submission = SongSubmission.model_validate(said)
    view = await accept(
        call.service, call.caller, submission, Response(), kind=kind, idempotency_key=how.idempotency_key, prefer=None
    )
    return await _waited(call, view, how.wait_s)


async def edit(call: Call, arguments: dict[str, Any]) -> JobView:
    how, said = _taken(Submitting, arguments)
    which, said = _taken(Editing, said)
    asked = EDITS[which.edit].model_validate(said)
    view = await edits.edit(call.service, call.caller, which.job, asked, Response(), how.idempotency_key, None)
    return await _waited(call, view, how.wait_s)


async def _waited(call: Call, view: JobView, seconds: float) -> JobView:
    if not seconds or view.finished_at is not None:
        return view
    job = await existing(call.service, view.id, call.caller)
    return await job_view(call.service, await wait(call.service, call.caller, job, seconds, call.report))


async def wait_for_job(call: Call, arguments: dict[str, Any]) -> JobView:
    asked = Waiting.model_validate(arguments)
    job = await existing(call.service, asked.job, call.caller)
    return await job_view(call.service, await wait(call.service, call.caller, job, asked.wait_s, call.report))


async def cancel(call: Call, arguments: dict[str, Any]) -> JobView:
    view = await library.cancel_job(Which.model_validate(arguments).job, call.service, call.caller, purge=False)
    assert isinstance(view, JobView), "only a purge answers otherwise"
    return view


async def list_jobs(call: Call, arguments: dict[str, Any]) -> ShortPage:
    asked = Listing.model_validate(arguments)
    page = await library.list_jobs(
        call.service, call.caller, view="short", **{name: getattr(asked, name) for name in Listing.model_fields}
    )
    assert isinstance(page, ShortPage), "as the view says"
    return page


async def play_link(call: Call, arguments: dict[str, Any]) -> PlayLinks:
    asked = Playing.model_validate(arguments)
    job = await existing(call.service, asked.job, call.caller)
    view = await job_view(call.service, job)
    items = job.result.items if job.result else ()
    there = len(items) or len(view.links.live)
    if not there:
        raise Conflict(why_nothing(job, "audio"), state=job.state)
    if asked.item is not None and asked.item >= there:
        raise InvalidRequest(f"item: the job has {there} songs to hear", field="item", limit=there)

    def signed(path: str) -> str:
        return public(call.service.signer.sign(path))

    return PlayLinks(
        state=view.state,
        audio=[
            ShortAudio(index=item.index, format=file.format, url=signed(audio_path(job.id, item.index, file.format)))
            for item in items
            if asked.item in (None, item.index)
            for file in item.files
        ],
        live=[
            signed(live_path(job.id, index))
            for index in range(len(view.links.live) if not job.ended else 0)
            if asked.item in (None, index)
        ],
    )


async def fleet_status(call: Call, arguments: dict[str, Any]) -> Cluster:
    _Arguments.model_validate(arguments)
    return Cluster.model_validate(await cluster.get_cluster(call.service))


def _taken(model: type[Any], arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments that are a model's own, read, and the others."""
    own = {name: value for name, value in arguments.items() if name in model.model_fields}
    return model.model_validate(own), {name: value for name, value in arguments.items() if name not in own}


def _schema(*models: type[BaseModel], only: tuple[str, ...] | None = None, **own: Any) -> dict[str, Any]:
    """JSON Schema of the arguments that are fields of these models; `only` these of them, where more are taken than are shown."""
    whole: dict[str, Any] = {"type": "object", "properties": {}, "required": [], "$defs": {}}
    for model in models:
        schema = model.model_json_schema()
        for name, field in schema.get("properties", {}).items():
            if only is None or name in only or name in (*Editing.model_fields, *Submitting.model_fields):
                whole["properties"].setdefault(name, field)
        whole["required"] += [name for name in schema.get("required", ()) if issubclass(model, _Arguments)]
        whole["$defs"] |= schema.get("$defs", {})
    whole["properties"] |= {name: field for name, field in own.items() if name in whole["properties"]}
    return _tidy({**whole, "additionalProperties": only is not None})


def _answers(model: type[BaseModel]) -> dict[str, Any]:
    """JSON Schema of an answer. What fields inside others mean is in the OpenAPI document alone: a host may show all of this to a model."""
    schema = model.model_json_schema()
    return _tidy({**schema, "$defs": _without(schema.get("$defs", {}), "description")})


def _tidy(schema: dict[str, Any]) -> dict[str, Any]:
    """Without what only takes place: titles that say the name again, and definitions that nothing refers to."""
    shown: dict[str, Any] = _without(schema, "title")
    known: dict[str, Any] = shown.pop("$defs", {})
    used: dict[str, Any] = {}
    left = [shown]
    while left:
        text = json.dumps(left.pop())
        for name in known.keys() - used.keys():
            if f'"#/$defs/{name}"' in text:
                used[name] = known[name]
                left.append(known[name])
    return shown | ({"$defs": used} if used else {})


def _without(schema: Any, word: str, names: bool = False) -> Any:
    """A schema without one of JSON Schema's words; `names`: its keys are names of fields or definitions."""
    if isinstance(schema, list):
        return [_without(part, word) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without(value, word, not names and key in ("properties", "$defs"))
        for key, value in schema.items()
        if names or key != word
    }


def shown(answer: BaseModel) -> dict[str, Any]:
    """An answer as JSON. Of a job without its audio codes, thousands of numbers that say nothing to who reads them."""
    if isinstance(answer, JobView):
        return answer.model_dump(
            mode="json", exclude={"plan": {"codes"}, "request": {"audio_codes": True, "plan": {"codes"}}}
        )
    return answer.model_dump(mode="json", exclude_unset=isinstance(answer, Cluster))


_JOB = _answers(JobView)
_EDIT_FIELDS = tuple(
    dict.fromkeys((*SHOWN, "item", *(name for kind in EDITS.values() for name in (*kind.own, *kind.takes))))
)
TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "make_song", "Make a song", f"Asks for a song, or several. Answers with its job, which has the time of arrival. {MORE}",
            _schema(Submitting, SongSubmission, only=SONG, plan={"type": "object", "description": PLAN}), _JOB, make,
        ),
        Tool(
            "plan_song", "Plan a song", "Decides tempo, key, length and description of a song without making it. The `plan` of the ended "
            f"job may be changed and given to make_song. {MORE}",
            _schema(Submitting, SongSubmission, only=SONG, plan={"type": "object", "description": PLAN}), _JOB, plan,
        ),
        Tool(
            "edit_song", "Edit a song", "Makes a new song from a finished one, in a job of its own; the old one stays. What is not said is as in it.",
            _schema(Submitting, Editing, *EDITS.values(), only=_EDIT_FIELDS), _JOB, edit,
        ),
        Tool(
            "wait_for_job", "Wait for a job", "The job once it has ended, or as it is after some seconds, with progress until then.",
            _schema(Waiting), _JOB, wait_for_job, reads_only=True,
        ),
        Tool("cancel_job", "Cancel a job", "Ends a job that waits or runs. An ended one stays as it is.", _schema(Which), _JOB, cancel, destroys=True),
        Tool("list_jobs", "List jobs", "Your jobs in few words, newest first.", _schema(Listing), _answers(ShortPage), list_jobs, reads_only=True),
        Tool(
            "play_link", "Links to hear a song", "Links that play in any browser or player, without a key: of the files, or of the sound of a song that is being made.",
            _schema(Playing), _answers(PlayLinks), play_link, reads_only=True,
        ),
        Tool(
            "fleet_status", "State of the fleet", "Which cards there are, what they do, and what is missing.",
            _schema(_Arguments), _answers(Cluster), fleet_status, reads_only=True,
        ),
    )
}  # fmt: skip
