"""The OpenAPI document, with what FastAPI cannot know: bodies that routes read by hand, events, webhooks, and an example of every field."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from importlib import resources
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from deployments.ingress.acestep import openapi as bodies
from deployments.ingress.acestep import tasks
from deployments.ingress.errors import Problem
from deployments.ingress.native import answers
from deployments.ingress.openai import audio, chat
from deployments.jobs.outbox import JobEnded

PLACE = "#/components/schemas/"
# Schemas that no route has in its signature: `SCHEMAS` of a room's modules says them.
ANSWERS: dict[str, Any] = {"Problem": Problem, "JobEnded": JobEnded, **answers.SCHEMAS, **tasks.SCHEMAS}
OPENAI: dict[str, Any] = {**chat.SCHEMAS, **audio.SCHEMAS}
TYPES = {
    bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"}, dict: {"object"}, type(None): {"null"},
}  # fmt: skip
_MAKING = threading.Lock()
_HEADERS = {
    "webhook-id": "Names the message; the same in every attempt.",
    "webhook-timestamp": "Unix seconds of the attempt.",
    "webhook-signature": "`v1,` and base64 of the HMAC-SHA256 over `id.timestamp.body` with the secret of `GET /v1/webhooks/secret`.",
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document of an application, made once, on any thread."""
    with _MAKING:
        return _described(app)


def _described(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = document["components"]["schemas"]
        for path in document["paths"].values():
            for operation in path.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):  # FastAPI's own, which nobody gets
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas |= copy.deepcopy(bodies.SCHEMAS)
        for title, kind in (ANSWERS | OPENAI).items():
            is_body = title.endswith(("Request", "Body"))
            mode = "validation" if is_body else "serialization"
            schema = TypeAdapter(kind).json_schema(ref_template=PLACE + "{model}", mode=mode)  # type: ignore[arg-type]
            for name, part in {**schema.pop("$defs", {}), title: schema}.items():
                schemas.setdefault(name, part)
        _give_examples(document)
        document["webhooks"] = {"jobEnded": {"post": _webhook()}}
        schemes = document["components"].setdefault("securitySchemes", {})
        schemes["key"] = {"type": "http", "scheme": "bearer", "description": "Only where the server has keys."}
        document["security"] = [{"key": []}, {}]
        app.openapi_schema = document
    return app.openapi_schema


def _webhook() -> dict[str, Any]:
    return {
        "operationId": "job_ended", "tags": ["webhooks"], "summary": "A job with a `webhook_url` has ended",
        "description": "Sent to the job's `webhook_url`, again for about two days until it is answered with 2xx or 410.",
        "parameters": [
            {"in": "header", "name": name, "required": True, "schema": {"type": "string"}, "description": about}
            for name, about in _HEADERS.items()
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": f"{PLACE}JobEnded"}}}},
        "responses": {
            "2XX": {"description": "Heard; the body is not looked at"},
            "410": {"description": "The receiver wants no more of this message"},
        },
    }  # fmt: skip


def _give_examples(document: dict[str, Any]) -> None:
    """Give every field and parameter that has none where it is defined an example: by its owner and name, else by its name, else its default."""
    text = resources.files(__package__).joinpath("field_examples.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    owned = [(name, schema) for name, schema in document["components"]["schemas"].items()]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            owned.append((path, operation.get("requestBody", {})))
            parameters = {p["name"]: p["schema"] for p in operation.get("parameters", ())}
            owned.append((path, {"properties": parameters}))
    for owner, schema in owned:
        for name, field in _fields(schema):
            if {"examples", "const", "enum"} & field.keys() or "$ref" in str(field):  # what that leads to has its own
                continue
            named = next((key for key in (f"{owner}.{name}", name) if key in table), None)
            if named is not None and _fits(table[named], field):
                field["examples"] = [table[named]]
            elif field.get("default") is not None:
                field["examples"] = [field["default"]]
            elif "boolean" in _kinds(field):
                field["examples"] = [True]
            elif field.get("format") == "binary":
                field["examples"] = ["(the file's bytes)"]


def _fits(example: Any, field: dict[str, Any]) -> bool:
    """Whether an example, which several fields of one name share, is one of this field."""
    kinds = _kinds(field)
    return not kinds or bool(TYPES[type(example)] & kinds)


def _kinds(field: dict[str, Any]) -> set[str]:
    return {kind["type"] for kind in (field, *field.get("anyOf", ())) if "type" in kind}


def _fields(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """All fields within a schema, with their names."""
    if isinstance(schema, list):
        for part in schema:
            yield from _fields(part)
    elif isinstance(schema, dict):
        if isinstance(fields := schema.get("properties"), dict):
            yield from fields.items()
        for name, part in schema.items():
            if name not in ("example", "examples", "default"):
                yield from _fields(part)
