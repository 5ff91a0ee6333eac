"""`/v1/chat/completions`: songs through clients that know chat, as a whole or as a stream."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse

from acestep.request import Adjustment
from deployments.ingress.acestep.bodies import Body
from deployments.ingress.acestep.results import error_text
from deployments.ingress.acestep.tasks import submit
from deployments.ingress.acestep.values import adjustment
from deployments.ingress.auth import Caller, HeldStream
from deployments.ingress.native.waiting import wait_for_end
from deployments.ingress.openai.answers import audio_parts, completion_id, markdown, usage, warned
from deployments.ingress.openai.messages import ChatRequest, Meaning, read_messages, task_fields, unused
from deployments.ingress.openai.route import (
    REFUSALS,
    STOPPING,
    OpenAIRoute,
    body_of,
    busy,
    caller_of,
    failed_status,
    not_there,
    parse_as,
)
from deployments.ingress.openai.schemas import ChatChunk, ChatCompletion, ChatMessage, Choice
from deployments.ingress.service import Service, Svc
from deployments.jobs.store import SUCCEEDED, Busy, Job
from deployments.jobs.threads import with_files

HEARTBEAT_S = 2.0
EXAMPLE = {"model": "acestep/acestep-v15-turbo", "messages": [{"role": "user", "content": "calm piano, slow"}]}
SCHEMAS: dict[str, Any] = {"ChatRequest": ChatRequest, "ChatChunk": ChatChunk}
_STREAM: dict[str, Any] = {
    "type": "string",
    "description": "With `stream`: lines `data:`, each a `ChatChunk`, and at last `data: [DONE]`.",
    "contentMediaType": "text/event-stream",
    "contentSchema": {"type": "array", "items": {"$ref": "#/components/schemas/ChatChunk"}},
}

router = APIRouter(prefix="/v1", tags=["chat"], responses=REFUSALS, route_class=OpenAIRoute)


@router.post(
    "/chat/completions", summary="A song as the answer of a chat", openapi_extra=body_of(ChatRequest, EXAMPLE),
    response_model=ChatCompletion, responses={200: {"content": {"text/event-stream": {"schema": _STREAM}}}},
)  # fmt: skip
async def create_chat_completion(request: Request, service: Svc) -> Any:
    caller = await caller_of(request, service)
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
        return busy(service, error)
    if chat.stream:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        frames = _stream(service, job, chat)
        return HeldStream(frames, place.pop_all(), media_type="text/event-stream", headers=headers)
    job = await wait_for_end(service, job, service.args.chat_timeout_s, to_the_end=True)
    if not job.ended:
        raise not_there(service, job)
    if job.state != SUCCEEDED:
        raise HTTPException(failed_status(job), error_text(job))
    return await with_files(_completion, service, chat, job)  # writes megabytes of base64


def _completion(service: Service, chat: ChatRequest, job: Job) -> JSONResponse:
    audio = audio_parts(service, job, inline=chat.wants_data)
    message = ChatMessage(role="assistant", content=markdown(service, job), audio=audio, audio_codes=None)
    answer = ChatCompletion.model_validate({
        "id": completion_id(job), "object": "chat.completion", "created": int(time.time()), "model": chat.model,
        "choices": [Choice(index=0, message=message, finish_reason="stop")], "usage": usage(job), **warned(job),
    })  # fmt: skip
    return JSONResponse(answer.model_dump(mode="json", exclude_unset=True))


def _parse(raw: bytes, content_type: str) -> tuple[ChatRequest, Meaning]:
    chat = parse_as(ChatRequest, raw, content_type)
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
        said = ChatChunk.model_validate({
            "id": stamp, "object": "chat.completion.chunk", "created": created, "model": chat.model,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more,
        })  # fmt: skip
        return f"data: {said.model_dump_json(exclude_unset=True)}\n\n".encode()

    try:
        yield chunk({"role": "assistant", "content": ""})
        while not (job := await wait_for_end(service, job, HEARTBEAT_S, to_the_end=True)).ended and not notices.over:
            yield chunk({"content": "."})
        if job.state == SUCCEEDED:
            yield chunk({"content": f"\n\n{markdown(service, job)}"}, **warned(job))
            audio = await with_files(audio_parts, service, job, inline=chat.wants_data)
            yield await with_files(chunk, {"audio": audio})
            yield chunk({}, "stop")
        else:
            yield chunk({"content": f"\n\nError: {error_text(job) if job.ended else STOPPING}"})
            yield chunk({}, "error")
        if chat.stream_options and chat.stream_options.include_usage:
            yield chunk({}, choices=[], usage=usage(job))
        yield b"data: [DONE]\n\n"
    finally:
        if not job.ended and service.args.cancel_with_stream and not notices.over:  # the client went away
            await asyncio.shield(service.dispatcher.cancel(job.id))
