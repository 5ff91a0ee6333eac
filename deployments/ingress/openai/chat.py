"""`/v1/chat/completions`: songs through clients that know chat, as a whole or as a stream."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from acestep.request import Adjustment
from acestep.validation import validation_problems
from deployments.ingress.acestep.answers import CompatRoute, caller_by_header, detail
from deployments.ingress.acestep.bodies import Body, parse_body
from deployments.ingress.acestep.results import error_text, warnings_of
from deployments.ingress.acestep.tasks import QUEUE_FULL, submit
from deployments.ingress.acestep.values import adjustment
from deployments.ingress.auth import Caller, HeldStream
from deployments.ingress.errors import STATUS, AsciiJSONResponse, in_one_line, retry_after
from deployments.ingress.links import audio_path, public
from deployments.ingress.native.waiting import wait_for_end
from deployments.ingress.openai.messages import ChatRequest, Meaning, read_messages, task_fields, unused
from deployments.ingress.service import Service, Svc
from deployments.jobs.store import SUCCEEDED, Busy, Job
from deployments.jobs.threads import with_files

HEARTBEAT_S = 2.0
STOPPING = "The server is stopping. The song is made at its next start."
USAGE = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}  # a song has none
MAX_INLINE_BYTES = (
    16 << 20
)  # of audio within an answer, which is held in memory several times; ten minutes of mp3 are 14 MB
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/ChatRequest"},
                "example": {"model": "acestep/acestep-v15-turbo", "messages": [{"role": "user", "content": "calm piano, slow"}]},
            }
        },
    }
}  # fmt: skip


class ChatRoute(CompatRoute):
    """A route whose errors are those of ACE-Step's server and, beside them, what OpenAI's clients read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def wrapped(request: Request) -> Response:
            answer = await handler(request)
            return _as_openai(answer) if answer.status_code >= 400 else answer

        return wrapped


def _as_openai(refusal: Response) -> Response:
    status, text = refusal.status_code, json.loads(bytes(refusal.body))["detail"]
    kind = ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    headers = {name: value for name, value in refusal.headers.items() if name == "retry-after"}
    if status in (409, 500, 504):  # their job was made: trying again by itself would make another
        headers["x-should-retry"] = "false"
    error = {"message": text, "type": kind, "param": None, "code": None}
    return AsciiJSONResponse({"detail": text, "error": error}, status_code=status, headers=headers)


router = APIRouter(prefix="/v1", tags=["chat"], route_class=ChatRoute)


def add_schemas(document: dict[str, Any]) -> None:
    """Put the body's schema, which the route reads by hand, into the OpenAPI document."""
    schema = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= {**schema.pop("$defs", {}), "ChatRequest": schema}


@router.post("/chat/completions", summary="A song as the answer of a chat", openapi_extra=_OPENAPI)
async def chat_completions(request: Request, service: Svc) -> Any:
    if service.args.open_models_and_chat and not request.headers.get("authorization"):
        caller = service.keys.anonymous
        await service.rates.take(caller)
    else:
        caller = await caller_by_header(request, service)
    with contextlib.ExitStack() as place:
        place.enter_context(service.waiting.hold(caller.name))
        async with service.sources.whole(request) as raw:
            chat, fields, warnings = await _read(service, caller, raw, request.headers.get("content-type", ""))
            del raw
        return await _answer(service, caller, chat, fields, warnings, place)


async def _answer(
    service: Service, caller: Caller, chat: ChatRequest, fields: dict[str, Any], warnings: list[Adjustment],
    place: contextlib.ExitStack,
) -> Any:  # fmt: skip
    """The job for what was read, and its end or a stream."""
    try:
        job = await submit(service, caller, Body(fields), warnings=warnings)
    except Busy as error:
        text = QUEUE_FULL if error.details.get("limit") == service.args.max_queue else error.message
        return detail(429, text, {"Retry-After": retry_after(error.details.get("retry_after", 1))})
    if chat.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        frames = _stream(service, job, chat)
        return HeldStream(frames, place.pop_all(), media_type="text/event-stream", headers=headers)
    job = await wait_for_end(service, job, service.args.chat_timeout_s, to_the_end=True)
    if not job.ended:
        raise HTTPException(504, STOPPING if service.dispatcher.notices.over else "Generation timeout")
    if job.state != SUCCEEDED:
        raise HTTPException(failed_status(job), error_text(job))
    message = {
        "role": "assistant",
        "content": markdown(job),
        "audio": await with_files(audio_parts, service, job),
        "audio_codes": None,
    }
    answer = {
        "id": completion_id(job),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": chat.model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    return await with_files(JSONResponse, answer | _warnings(job))  # writes megabytes of base64


def _warnings(job: Job) -> dict[str, Any]:
    told = warnings_of(job)
    return {"warnings": told} if told else {}


def _parse(raw: bytes, content_type: str) -> tuple[ChatRequest, Meaning]:
    try:
        chat = ChatRequest.model_validate(parse_body(raw, content_type).fields)
    except ValidationError as error:
        found = validation_problems(error.errors(include_url=False, include_input=False))
        raise HTTPException(400, f"Invalid request format: {in_one_line(found)}") from None
    try:
        return chat, read_messages(chat)
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


async def _read(
    service: Service, caller: Caller, raw: bytes, content_type: str
) -> tuple[ChatRequest, dict[str, Any], list[Adjustment]]:
    """The chat without its messages, the fields of its task, and what is to be said of them. Keeps the audio in the file store."""
    chat, meaning = await with_files(_parse, raw, content_type)
    fields = task_fields(chat, meaning)
    # Songs from nothing take the audio as an example of style, all other tasks as what they work on.
    roles = ["reference_audio_path"] if chat.task_type == "text2music" else ["src_audio_path", "reference_audio_path"]
    warnings = unused(chat, meaning)
    if len(meaning.audio) > len(roles):
        warnings.append(adjustment("input_audio", len(meaning.audio), len(roles), f"all that {chat.task_type} can use"))
    for role, data in zip(roles, meaning.audio, strict=False):
        if isinstance(data, str):
            record = (await service.source(data, caller, "input_audio")).record
        else:
            record = await service.sources.keep(data, "chat-audio", caller, field="input_audio")
        fields[role] = record.id
    return chat.model_copy(update={"messages": []}), fields, warnings


async def _stream(service: Service, job: Job, chat: ChatRequest) -> AsyncIterator[bytes]:
    created, stamp, notices = int(time.time()), completion_id(job), service.dispatcher.notices

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        data = {
            "id": stamp, "object": "chat.completion.chunk", "created": created, "model": chat.model,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more,
        }  # fmt: skip
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()

    try:
        yield chunk({"role": "assistant", "content": ""})
        while not (job := await wait_for_end(service, job, HEARTBEAT_S, to_the_end=True)).ended and not notices.over:
            yield chunk({"content": "."})
        if job.state == SUCCEEDED:
            yield chunk({"content": f"\n\n{markdown(job)}"}, **_warnings(job))
            audio = await with_files(audio_parts, service, job)
            yield await with_files(chunk, {"audio": audio})
            yield chunk({}, "stop")
        else:
            yield chunk({"content": f"\n\nError: {error_text(job) if job.ended else STOPPING}"})
            yield chunk({}, "error")
        if chat.stream_options and chat.stream_options.include_usage:
            yield chunk({}, choices=[], usage=USAGE)
        yield b"data: [DONE]\n\n"
    finally:
        if not job.ended and service.args.cancel_with_stream and not notices.over:  # the client went away
            await asyncio.shield(service.dispatcher.cancel(job.id))


def failed_status(job: Job) -> int:
    """HTTP status of a job that gave no song: what is wrong with the request is the caller's, all else ours."""
    status = STATUS.get(str((job.error or {}).get("type")), 500)
    return {422: 400, 409: 409}.get(status, 500)


def completion_id(job: Job) -> str:
    return f"chatcmpl-{job.id.replace('-', '')[:24]}"


def markdown(job: Job) -> str:
    """What the song is, for people."""
    request = job.request
    metadata = job.plan.metadata if job.plan else None
    facts = {
        "Caption": job.extra.get("compat", {}).get("prompt") or (metadata and metadata.caption) or request.prompt,
        "BPM": (metadata and metadata.bpm) or request.bpm,
        "Duration": f"{job.result.items[0].duration:g}s" if job.result else None,
        "Key": (metadata and metadata.keyscale) or request.key_scale,
        "Time Signature": (metadata and metadata.timesignature) or request.time_signature,
    }
    lines = [f"**{name}:** {value}" for name, value in facts.items() if value]
    text = "\n".join(["## Metadata", *lines]) if lines else "Music generated successfully."
    return text if request.instrumental else f"{text}\n\n## Lyrics\n{request.lyrics}"


def audio_parts(service: Service, job: Job) -> list[dict[str, Any]] | None:
    """Every song of the batch: as a data URL, or by its signed URL once the answer would hold more than `MAX_INLINE_BYTES` of audio.

    Reads files, so it is for a thread.
    """
    if job.result is None:
        return None
    parts, left = [], MAX_INLINE_BYTES
    for item in job.result.items:
        file = item.files[0]
        if file.bytes > left:
            url = public(service.signer.sign(audio_path(job.id, item.index, file.format)))
        else:
            left -= file.bytes
            data = base64.b64encode(service.storage.read(file.path)).decode("ascii")
            url = f"data:{file.content_type};base64,{data}"
        seeds = {"seed": item.seed, "lm_seed": item.lm_seed, "retake_seed": item.retake_seed}
        parts.append({"type": "audio_url", "audio_url": {"url": url}, **seeds})
    return parts
