"""Bodies of the routes that read them by hand, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from acestep.request import SongRequest
from deployments.ingress.acestep.fields import FIELDS, Field

_TYPES = {"str": "string", "text": "string", "bool": "boolean", "int": "integer", "float": "number"}
SCHEMAS: dict[str, Any] = {}  # of all bodies, by name
_FORMS = ("application/json", "application/x-www-form-urlencoded", "multipart/form-data")


def _schema(field: Field) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    if field.kind in _TYPES:
        schema["type"] = _TYPES[field.kind]
    if field.choices:
        schema["enum"] = list(field.choices)
    if field.default is not None and field.kind != "raw":
        schema["default"] = field.default
    known = SongRequest.model_fields.get(field.name)
    about = [text] if (text := field.about or (known and known.description)) else []
    if field.aliases:
        about.append(f"Also: {', '.join(field.aliases)}.")
    if field.low is not None:
        about.append(f"{field.low:g} to {field.high:g}.")
    if field.no_effect:
        about.append(f"No effect: {field.no_effect}.")
    return {**schema, **({"description": " ".join(about)} if about else {})}


def _body(
    name: str, properties: dict[str, Any], example: dict[str, Any], *, files: dict[str, Any] | None = None
) -> dict[str, Any]:
    """`openapi_extra` of a route that takes these fields in any encoding; `name` is their schema's."""
    SCHEMAS[name] = {"type": "object", "title": name, "properties": properties}
    if files:
        SCHEMAS[f"{name}WithFiles"] = {"type": "object", "title": f"{name}WithFiles", "properties": properties | files}
    content: dict[str, Any] = {}
    for kind in _FORMS:
        shown = f"{name}WithFiles" if files and kind.startswith("multipart") else name
        content[kind] = {"schema": {"$ref": f"#/components/schemas/{shown}"}}
    content["application/json"]["example"] = example
    return {"requestBody": {"content": content}}


_TOKEN = {"ai_token": {"type": "string", "description": "The API key, instead of the Authorization header."}}


def release_body() -> dict[str, Any]:
    part = {"type": "string", "format": "binary", "description": "Audio, instead of the field with a path."}
    return _body(
        "ReleaseTaskBody",
        {name: _schema(field) for name, field in FIELDS.items()} | _TOKEN,
        {"prompt": "upbeat synth pop", "lyrics": "[Verse]\nLights go by", "audio_duration": 30, "thinking": True},
        files=dict.fromkeys(("src_audio", "ctx_audio", "reference_audio", "ref_audio"), part),
    )


def query_body() -> dict[str, Any]:
    ids = {"description": "A list of ids, or the JSON text of one."}
    return _body(
        "QueryResultBody", {"task_id_list": ids, **_TOKEN}, {"task_id_list": ["3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52"]}
    )


def cancel_body() -> dict[str, Any]:
    return _body(
        "CancelTaskBody",
        {"task_id": {"type": "string", "description": "As /release_task gave it."}, **_TOKEN},
        {"task_id": "3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52"},
    )


def format_body() -> dict[str, Any]:
    return _body(
        "FormatInputBody",
        {
            "prompt": {"type": "string", "description": "Description of the music."},
            "lyrics": {"type": "string", "description": "Lyrics."},
            "temperature": {"type": "number", "default": 0.85, "description": "Of the planner's sampling."},
            "param_obj": {"description": "duration, bpm, key, time_signature, language; an object or its JSON text."},
            **_TOKEN,
        },
        {"prompt": "sad song", "lyrics": "", "param_obj": {"duration": 60}},
    )


def sample_body() -> dict[str, Any]:
    return _body(
        "CreateSampleBody",
        {
            "query": {"type": "string", "description": "A wish in everyday words."},
            "instrumental": {"type": "boolean", "default": False, "description": "Nobody sings."},
            "vocal_language": {
                "type": "string",
                "default": "unknown",
                "description": "Code or name; unknown: the planner decides.",
            },
            "temperature": {"type": "number", "default": 0.85, "description": "Of the planner's sampling."},
            **_TOKEN,
        },
        {"query": "a song for a long drive home"},
    )


def random_body() -> dict[str, Any]:
    kind = {"type": "string", "default": "simple_mode", "description": "simple_mode, or anything else for whole songs."}
    return _body("RandomSampleBody", {"sample_type": kind, **_TOKEN}, {"sample_type": "simple_mode"})
