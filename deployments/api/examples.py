"""Examples in the OpenAPI document. A test sends the requests."""

from __future__ import annotations

from typing import Any

SONGS: dict[str, Any] = {
    "simple": {
        "summary": "A description is enough",
        "value": {"prompt": "warm lo-fi piano, rain on the window, slow", "duration": 30},
    },
    "song": {
        "summary": "Lyrics, metadata and a seed",
        "value": {
            "prompt": "upbeat synth pop, bright lead, driving bass",
            "lyrics": "[Verse]\nLights go by along the shore\n[Chorus]\nDrive with me, drive some more",
            "duration": 60, "bpm": 118, "key_scale": "A minor", "vocal_language": "en", "seed": 42,
            "formats": ["flac", "mp3"],
        },
    },
    "variants": {
        "summary": "Four variants, without the planner",
        "value": {"prompt": "solo cello, slow and dark", "duration": 20, "thinking": False, "batch_size": 4},
    },
}  # fmt: skip

_JOB: dict[str, Any] = {
    "id": "3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52", "kind": "song", "state": "queued", "stage": "queued", "progress": None,
    "position": 1, "eta_s": 12.5, "cost": {"audio_s": 30.0, "plan_s": 6.1, "render_s": 4.4}, "usage": None,
    "created_at": 1790000000.0, "started_at": None, "finished_at": None, "attempts": 0,
    "request": {"prompt": "warm lo-fi piano, rain on the window, slow", "duration": 30.0, "seed": 1234}, "seeds": [1234],
    "warnings": [], "plan": None, "error": None, "result": None,
    "links": {"self": "/v1/jobs/3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52",
              "events": "/v1/jobs/3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52/events"},
}  # fmt: skip


def _json(description: str, example: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"example": example}}}


JOB_202 = _json("The job was accepted", _JOB)
JOB_200 = _json("The job", _JOB)
JOBS_200 = _json("A page of jobs; `next` is the cursor of the next one", {"jobs": [_JOB], "next": None})
EVENTS = (
    'id: 7\nevent: progress\ndata: {"job_id": "3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52", "at": 1790000002.0, '
    '"stage": "planning", "done": 40, "total": 150}\n\n'
)
AUDIO: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": {"audio/*": {"schema": {"type": "string", "format": "binary"}}}},
    206: {"description": "The range that was asked for"},
    416: {"description": "The range is outside the file"},
}
