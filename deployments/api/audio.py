"""Stored files as responses: HEAD, ranges, right types, from a local folder or an object store."""

from __future__ import annotations

import hashlib
import re
from email.utils import formatdate

from fastapi import HTTPException, Request
from fastapi.responses import Response, StreamingResponse

from deployments.api.problems import NotFound
from deployments.storage import Storage

_RANGE = re.compile(r"bytes\s*=\s*([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)
GONE = "the file is no longer kept"


def send_file(request: Request, storage: Storage, name: str, content_type: str, download_name: str) -> Response:
    """A stored file, or the part of it that `Range` asks for.

    Raises:
        NotFound: the file is no longer there.
        HTTPException: 416, the file has no such part.
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
    known = request.headers.get("if-none-match", "")
    if known.strip() == "*" or etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
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
