"""Stored files as responses: HEAD, ranges, preconditions, right types, from a local folder or an object store."""

from __future__ import annotations

import hashlib
import re
from email.utils import formatdate, parsedate_to_datetime
from typing import Any

from fastapi import HTTPException, Request
from fastapi.responses import Response, StreamingResponse
from starlette.datastructures import Headers

from acestep.formats import FORMATS
from deployments.ingress.errors import NotFound
from deployments.jobs.blobs import Storage

_ETAG: dict[str, Any] = {"description": "Names this version of the file.", "schema": {"type": "string"}}
_BYTES: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
# What a download may answer, for the OpenAPI document.
DOWNLOADS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "headers": {"ETag": _ETAG}},
    206: {"description": "The range that was asked for", "headers": {"ETag": _ETAG}},
    304: {"description": "Not changed since: `If-None-Match`, `If-Modified-Since`"},
}
SOUND = dict.fromkeys(sorted({form.content_type for form in FORMATS.values()}), _BYTES)
AUDIO = DOWNLOADS | {status: {**DOWNLOADS[status], "content": SOUND} for status in (200, 206)}

_RANGE = re.compile(r"bytes\s*=\s*([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)
GONE = "the file is no longer kept"


def send_file(request: Request, storage: Storage, name: str, content_type: str, download_name: str) -> Response:
    """A stored file, or the part of it that `Range` asks for.

    Raises:
        NotFound: the file is no longer there.
        HTTPException: 412, it is another file; 416, it has no such part.
    """
    found = storage.find(name)
    if found is None:
        raise NotFound(GONE)
    size = found.bytes
    etag = f'"{hashlib.sha256(f"{name}:{size}:{found.modified}".encode()).hexdigest()[:32]}"'
    headers = {
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'inline; filename="{download_name}"',
        "ETag": etag,
        "X-Content-Type-Options": "nosniff",
    }
    if found.modified is not None:
        headers["Last-Modified"] = formatdate(found.modified, usegmt=True)
    ended = _precondition(request.headers, etag, found.modified)
    if ended == 412:
        raise HTTPException(
            412, "the file is not the one that If-Match or If-Unmodified-Since asks for", {"ETag": etag}
        )
    if ended is not None:
        return Response(status_code=ended, headers=headers)
    first, last, status = 0, size - 1, 200
    same = request.headers.get("if-range", etag) in (etag, headers.get("Last-Modified"))
    asked = request.headers.get("range", "") if same else ""
    # Several ranges at once, and what is no range of bytes, are answered with the whole file, as RFC 9110 wants.
    if (match := _RANGE.fullmatch(asked.strip())) and any(match.groups()):
        start, end = match.groups()
        if start:
            first, last = int(start), min(int(end) if end else size - 1, size - 1)
        else:
            first = max(0, size - int(end))
        if first > last or first >= size:
            raise HTTPException(416, f"the file has {size} bytes", {"Content-Range": f"bytes */{size}"})
        status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
    headers["Content-Length"] = str(last - first + 1)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=content_type)
    body = storage.stream(name, first, last + 1)
    return StreamingResponse(body, status_code=status, media_type=content_type, headers=headers)


def _precondition(asked: Headers, etag: str, modified: float | None) -> int | None:
    """412 or 304 where a precondition of the request (RFC 9110, section 13.2.2) ends it; None where the file is to be sent."""
    second = None if modified is None else int(modified)  # as exact as Last-Modified is
    if (tags := asked.get("if-match")) is not None:
        if not _names(tags, etag, weak=False):
            return 412
    elif second is not None and (since := _date(asked.get("if-unmodified-since"))) is not None and second > since:
        return 412
    if (tags := asked.get("if-none-match")) is not None:
        return 304 if _names(tags, etag, weak=True) else None
    since = _date(asked.get("if-modified-since"))
    return 304 if second is not None and since is not None and second <= since else None


def _names(tags: str, etag: str, *, weak: bool) -> bool:
    given = [tag.strip() for tag in tags.split(",")]
    return given == ["*"] or etag in (tag.removeprefix("W/") if weak else tag for tag in given)


def _date(text: str | None) -> float | None:
    """Unix seconds of an HTTP date; None for what is none, which RFC 9110 ignores."""
    try:
        return parsedate_to_datetime(text).timestamp() if text else None
    except (ValueError, OverflowError):
        return None
