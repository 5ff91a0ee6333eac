"""Bodies in any of the encodings that ACE-Step's clients use: JSON, forms with and without files, and neither said nor known."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile

from deployments.ingress.bodies import parse_json

MALFORMED = "Malformed JSON payload"
NOT_AN_OBJECT = "JSON payload must be an object"
HINT = "Invalid JSON body (hint: set 'Content-Type: application/json')"
BAD_FORM = "Malformed form payload"
TOO_MANY = "Too many form fields: at most {}"
MAX_FIELDS = 500
MAX_FILES = 8
MAX_TEXT_BYTES = 128 << 10  # the codes of ten minutes are 60 KB
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass
class Body:
    """Fields and file parts. `form`: everything is text."""

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, UploadFile] = field(default_factory=dict)
    form: bool = False


async def read_body(request: Request, *, optional: bool = False) -> Body:
    """The body of a request.

    Args:
        optional: No body at all is an empty one.

    Raises:
        HTTPException: 400 or 415, with ACE-Step's texts.
    """
    declared = request.headers.get("content-type", "")
    kind = declared.partition(";")[0].strip().lower()
    if kind == "application/x-www-form-urlencoded" and (text := (await request.body()).strip())[:1] in (b"{", b"["):
        return Body(_object(text, HINT))  # `curl -d '{...}'` without a header; a form would have escaped it
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        multipart = kind.startswith("multipart")
        if multipart and "boundary=" not in declared.lower():
            raise HTTPException(400, BAD_FORM)
        try:
            form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_TEXT_BYTES)
        except ValueError:  # what the parser does not turn into an HTTP error itself
            raise HTTPException(400, BAD_FORM) from None
        if multipart and not form and not optional:  # the parser takes a broken body for one without parts
            raise HTTPException(400, BAD_FORM)
        files = {name: part for name, part in form.multi_items() if isinstance(part, UploadFile)}
        texts = ((name, part) for name, part in form.multi_items() if isinstance(part, str))
        return Body(_grouped(texts), files, form=True)
    return parse_body(await request.body(), declared, optional=optional)


def parse_body(raw: bytes, declared: str, *, optional: bool = False) -> Body:
    """A body without files.

    Args:
        declared: Its Content-Type.

    Raises:
        HTTPException: 400 or 415, with ACE-Step's texts.
        TooLarge: more values than a song can need.
    """
    kind = declared.partition(";")[0].strip().lower()
    if kind == "application/json" or kind.endswith("+json"):
        if not raw.strip() and optional:
            return Body()
        return Body(_object(raw, MALFORMED))
    text = raw.strip()
    if text[:1] in (b"{", b"["):
        return Body(_object(text, HINT))
    if b"=" in text:
        try:
            pairs = parse_qsl(text.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
        except ValueError:
            raise HTTPException(400, TOO_MANY.format(MAX_FIELDS)) from None
        return Body(_grouped(pairs), form=True)
    if not text and optional:
        return Body()
    raise HTTPException(
        415,
        f"Unsupported Content-Type: {_shown(declared)}; use application/json, application/x-www-form-urlencoded, "
        "or multipart/form-data",
    )


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Pairs as a dict; a repeated name gives a list."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name not in found:
            found[name] = value
        elif isinstance(found[name], list):
            found[name].append(value)
        else:
            found[name] = [found[name], value]
    return found


def _object(raw: bytes, message: str) -> dict[str, Any]:
    try:
        value = parse_json(raw)
        if _SURROGATE.search(raw):  # lone ones can be written in JSON, but neither stored nor sent back
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError:
        raise HTTPException(400, message) from None
    if not isinstance(value, dict):
        raise HTTPException(400, NOT_AN_OBJECT)
    return value


def _shown(content_type: str) -> str:
    return content_type[:100] if content_type.strip() and content_type.isprintable() else "(missing)"
