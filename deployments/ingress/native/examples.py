"""Examples in the OpenAPI document. A test sends the requests."""

from __future__ import annotations

from typing import Any

from deployments.ingress.downloads import DOWNLOADS
from deployments.ingress.native.answers import JobView

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

EXTEND: dict[str, Any] = {"after": {"summary": "Twenty seconds more", "value": {"after": 20}}}
REPLACE: dict[str, Any] = {
    "line": {"summary": "One part", "value": {"regions": [{"start": 8, "end": 12}]}},
    "lines": {
        "summary": "Two parts, each with words of its own",
        "value": {"regions": [
            {"start": 4, "end": 8, "prompt": "a guitar solo"}, {"start": 20, "end": 26, "lyrics": "[Verse]\nThe lights go out"},
        ]},
    },
}  # fmt: skip
COVER: dict[str, Any] = {"style": {"summary": "Another style", "value": {"prompt": "the same with strings"}}}
VARY: dict[str, Any] = {"near": {"summary": "Near to it, twice", "value": {"strength": 0.3, "batch_size": 2}}}
LAYER: dict[str, Any] = {"drums": {"summary": "Drums", "value": {"track_name": "drums", "prompt": "brushed drums"}}}
STEM: dict[str, Any] = {"vocals": {"summary": "The voice", "value": {"track_name": "vocals"}}}
LYRICS: dict[str, Any] = {"both": {"summary": "When, and how well", "value": {"timestamps": True, "score": True}}}
INSPIRE: dict[str, Any] = {"wish": {"summary": "A wish", "value": {"query": "a song for a long drive home"}}}
FORMAT: dict[str, Any] = {"sketch": {"summary": "A sketch", "value": {"caption": "sad piano song", "bpm": 72}}}
UNDERSTAND: dict[str, Any] = {
    "codes": {"summary": "Audio codes, five per second", "value": {"codes": [35847, 12, 4711, 60000, 1]}}
}

_ID = "3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52"
_JOB: dict[str, Any] = {
    "id": _ID, "title": None, "favourite": False, "labels": [], "kind": "song", "of": None, "state": "queued",
    "stage": "queued", "progress": None,
    "position": 1, "eta_s": 12.5, "cost": {"audio_s": 30.0, "plan_s": 6.1, "render_s": 4.4}, "usage": None,
    "created_at": 1790000000.0, "started_at": None, "finished_at": None, "cancel_requested": False, "attempts": 0,
    "placement": {"planner": "lm", "renderer": "dit"},
    "request": {"prompt": "warm lo-fi piano, rain on the window, slow", "duration": 30.0, "seed": 1234}, "seeds": [1234],
    "warnings": [], "plan": None, "error": None, "result": None,
    "links": {"self": f"/v1/jobs/{_ID}", "events": f"/v1/jobs/{_ID}/events",
              "live": [f"/v1/jobs/{_ID}/audio/0/live"]}, "notice": None,
}  # fmt: skip
_PLAN: dict[str, Any] = {
    "metadata": {"bpm": 72, "caption": "Warm lo-fi piano over steady rain", "duration": 30.0, "keyscale": "D minor",
                 "language": "unknown", "timesignature": "4"},
    "adjustments": [], "scores": [], "item_metadata": [], "codes": [[35847, 12, 4711]], "lm_seeds": [1234],
    "model": "acestep-5Hz-lm-1.7B", "model_hash": None, "notice": None, "timings": {"queued_s": 0.0, "metadata_s": 0.9, "codes_s": 5.2, "scores_s": 0.0, "steps": 231},
}  # fmt: skip
_DONE: dict[str, Any] = {
    **_JOB, "state": "succeeded", "stage": "succeeded", "position": 0, "eta_s": None, "attempts": 1, "started_at": 1790000000.2,
    "finished_at": 1790000011.0, "plan": _PLAN,
    "usage": {"audio_s": 30.0, "device_s": {"plan": 6.1, "render": 4.2}, "total_s": 11.0},
    "result": {
        "items": [{"index": 0, "seed": 1234, "lm_seed": 1234, "retake_seed": None, "duration": 30.0, "samples": 1440000, "sample_rate": 48000, "channels": 2,
                   "gain_db": 2.1, "made_gain_db": None, "audio": [{
            "format": "wav", "content_type": "audio/wav", "bytes": 5760044, "sha256": "9f86d081884c7d65" * 4,
            "url": f"/v1/jobs/{_ID}/audio/0.wav?expires=1790086440&signature=p2vW1yVbJ0mYxkq0pC9nq8G4b3l2i1hTz7cRr5sXw8E",
        }], "files": [{
            "kind": "latent", "content_type": "application/octet-stream", "bytes": 96312, "sha256": "9f86d081884c7d65" * 4,
            "url": f"/v1/jobs/{_ID}/files/0.latent?expires=1790086440&signature=p2vW1yVbJ0mYxkq0pC9nq8G4b3l2i1hTz7cRr5sXw8E",
        }], "scores": None, "planner_scores": None}],
        "renderer": "acestep-v15-turbo", "renderer_hash": None, "device": "NVIDIA L4", "settings": {},
        "timings": {"plan": _PLAN["timings"], "render": {"queued_s": 0.0, "conditions_s": 0.2, "denoise_s": 2.4, "decode_s": 1.6,
                                                         "encode_s": 0.1}},
    },
}  # fmt: skip
_HEARD: dict[str, Any] = {
    **_DONE, "kind": "lyrics", "of": _ID, "usage": {"audio_s": 0.0, "device_s": {"plan": 0.0, "render": 0.4}, "total_s": 0.6}, "plan": None,
    "result": {**_DONE["result"], "items": [{
        **_DONE["result"]["items"][0], "gain_db": None, "audio": [], "files": [{
            "kind": kind, "content_type": content_type, "bytes": 512, "sha256": "9f86d081884c7d65" * 4,
            "url": f"/v1/jobs/{_ID}/files/0.{kind}?expires=1790086440&signature=p2vW1yVbJ0mYxkq0pC9nq8G4b3l2i1hTz7cRr5sXw8E",
        } for kind, content_type in (("lrc", "text/plain; charset=utf-8"), ("lyrics", "application/json"))],
    }]},
}  # fmt: skip
_FILE: dict[str, Any] = {
    "id": "file-0123456789abcdef0123456789abcdef", "kind": "audio", "name": "guitar.wav", "bytes": 5760044, "sha256": "9f86d081884c7d65" * 4,
    "duration": 30.0, "created_at": 1790000000.0, "expires_at": 1790086400.0,
}  # fmt: skip
_WEBHOOK: dict[str, Any] = {
    "id": "msg_0123456789abcdef0123456789abcdef", "job_id": _ID, "url": "https://example.com/hook", "type": "job.succeeded",
    "state": "pending", "attempts": 2, "next_at": 1790000316.0, "last_status": 503, "last_error": "HTTP 503",
    "created_at": 1790000011.0, "delivered_at": None,
}  # fmt: skip
_SAMPLE: dict[str, Any] = {
    "caption": "Slow, sad piano ballad with strings", "lyrics": "[Verse]\nThe lights go out", "bpm": 72, "duration": 150.0,
    "keyscale": "D minor", "language": "en", "timesignature": "4", "instrumental": False, "seed": 1234,
    "model": "acestep-5Hz-lm-1.7B", "notice": None, "timings": {"queued_s": 0.0, "metadata_s": 2.1, "codes_s": 0.0, "scores_s": 0.0, "steps": 180},
}  # fmt: skip


def _json(description: str, example: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"example": example}}}


def _whole(job: dict[str, Any]) -> dict[str, Any]:
    """The example as the server would answer it: what a later version adds is there with its default."""
    return JobView.model_validate(job).model_dump(mode="json")


JOB_202 = _json("The job was accepted", _whole(_JOB))
JOB_200 = _json("The job", _whole(_DONE))
JOBS_200 = _json("A page of jobs; `next` is the cursor of the next one", {"jobs": [_whole(_DONE)], "next": None})
LYRICS_202 = _json("The job was accepted", {**_JOB, "kind": "lyrics", "of": _ID})
LYRICS_200 = _json("It ended within `Prefer: wait=n`", _HEARD)
FILE = _json("The file", _FILE)
WEBHOOK = _json("The message", _WEBHOOK)
WEBHOOKS = _json("The messages", {"webhooks": [_WEBHOOK]})
SECRET = _json("The secret", {"secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"})
SAMPLE = _json("The description", _SAMPLE)
EVENTS = (
    'id: 7\nevent: started\ndata: {"job_id": "3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52", "at": 1790000001.0, "attempt": 1}\n\n'
    'event: progress\ndata: {"job_id": "3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52", "at": 1790000002.0, '
    '"stage": "planning", "done": 40, "total": 150}\n\n'
)
_SOUND = {"schema": {"type": "string", "format": "binary"}}
LIVE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The sound, until the song's end; `Audio-Level` says `final` or `provisional` where it had begun",
        "content": dict.fromkeys(("audio/mpeg", "audio/ogg", "audio/wav"), _SOUND),
    },
    204: {"description": "Asked for by `Range`: nothing of it yet, or no more (then with `Content-Range`)"},
    206: {"description": "What there is of the range that was asked for"},
    412: {"description": "The song is made anew: listen again from the start"},
    416: {"description": "The song is not as far"},
}
FILES: dict[int | str, dict[str, Any]] = {
    **DOWNLOADS,
    200: {
        "description": "The file",
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "text/plain": {"schema": {"type": "string"}, "example": "[00:03.12]Lights go by along the shore"},
            "application/json": {"schema": {"$ref": "#/components/schemas/TimedLyrics"}},
        },
    },
}
