"""A job's end in the words of chats: what the song is, where it plays, what it counts for."""

from __future__ import annotations

import base64
import math
from typing import Any

from acestep.plan import CODES_PER_SECOND
from acestep.song import SongItem
from deployments.ingress.acestep.results import warnings_of
from deployments.ingress.links import absolute, audio_path
from deployments.ingress.openai.schemas import AudioLink, AudioPart, CompletionDetails, PromptDetails, TokenUsage
from deployments.ingress.service import Service
from deployments.jobs.store import Job

MAX_INLINE_BYTES = (
    16 << 20
)  # of audio within an answer, which is held in memory several times; ten minutes of mp3 are 14 MB
CHARS_PER_TOKEN = 4  # of most languages' texts, roughly


def completion_id(job: Job) -> str:
    return f"chatcmpl-{job.id.replace('-', '')[:24]}"


def link(service: Service, job: Job, item: SongItem) -> str:
    """URL of a song, signed, with this server's address as its caller wrote it."""
    return absolute(service.signer.sign(audio_path(job.id, item.index, item.files[0].format)))


def markdown(service: Service, job: Job) -> str:
    """What the song is, for people, and a link that plays it."""
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
    lines = ["## Metadata", *lines] if lines else ["Music generated successfully."]
    made = [item for item in job.result.items if item.files] if job.result else []
    for item in made:
        name = "Audio" if len(made) == 1 else f"Audio {item.index + 1}"
        lines.append(f"**{name}:** [{item.files[0].format}, {item.duration:g} s]({link(service, job, item)})")
    text = "\n".join(lines)
    return text if request.instrumental else f"{text}\n\n## Lyrics\n{request.lyrics}"


def audio_parts(service: Service, job: Job, *, inline: bool = True) -> list[AudioPart] | None:
    """Every song of the batch: as a data URL, or by its link once the answer would hold more than `MAX_INLINE_BYTES` of audio.

    Reads files, so it is for a thread.

    Args:
        inline: Data is wanted at all.
    """
    if job.result is None:
        return None
    parts, left = [], MAX_INLINE_BYTES if inline else 0
    for item in job.result.items:
        file = item.files[0]
        if file.bytes > left:
            url = link(service, job, item)
        else:
            left -= file.bytes
            data = base64.b64encode(service.storage.read(file.path)).decode("ascii")
            url = f"data:{file.content_type};base64,{data}"
        part = AudioPart(
            type="audio_url", audio_url=AudioLink(url=url), seed=item.seed, lm_seed=item.lm_seed, retake_seed=item.retake_seed
        )  # fmt: skip
        parts.append(part)
    return parts


def usage(job: Job) -> TokenUsage:
    """What a job counts for. A song has no tokens of a text; what it has are seconds, of which the planner counts five codes each."""
    made_s = sum(item.duration for item in job.result.items if item.files) if job.result else 0.0
    asked = math.ceil(len(f"{job.request.prompt}{job.request.lyrics}") / CHARS_PER_TOKEN)
    made = round(made_s * CODES_PER_SECOND)
    return TokenUsage(
        prompt_tokens=asked, completion_tokens=made, total_tokens=asked + made, audio_seconds=round(made_s, 3),
        prompt_tokens_details=PromptDetails(cached_tokens=0, audio_tokens=0),
        completion_tokens_details=CompletionDetails(audio_tokens=made, reasoning_tokens=0),
    )  # fmt: skip


def warned(job: Job) -> dict[str, Any]:
    """The field `warnings`, where there is something to say."""
    told = warnings_of(job)
    return {"warnings": told} if told else {}
