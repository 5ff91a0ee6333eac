"""Stored files as responses: HEAD, ranges, right types, from a local folder or an object store."""

from __future__ import annotations

import hashlib
import re
from typing import Literal

from fastapi import Request
from fastapi.responses import FileResponse, Response, StreamingResponse

from deployments.api.problems import NotFound
from deployments.storage import Storage

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_NOSNIFF = {"X-Content-Type-Options": "nosniff"}
GONE = "the file is no longer kept"


def send_file(
    request: Request,
    storage: Storage,
    name: str,
    content_type: str,
    download_name: str,
    disposition: Literal["inline", "attachment"] = "inline",
) -> Response:
    """A stored file, or the part of it that `Range` asks for.

    Raises:
        NotFound: the file is no longer there.
    """
    path = storage.local_path(name)
    if path is not None:
        if not path.is_file():
            raise NotFound(GONE)
        return FileResponse(
            path,
            media_type=content_type,
            filename=download_name,
            content_disposition_type=disposition,
            headers=dict(_NOSNIFF),
        )
    size = storage.size(name)
    if size is None:
        raise NotFound(GONE)
    headers = {
        **_NOSNIFF,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'{disposition}; filename="{download_name}"',
        "ETag": f'"{hashlib.sha256(f"{name}:{size}".encode()).hexdigest()[:32]}"',
    }
    first, last, status = 0, size - 1, 200
    # Several ranges at once are answered with the whole file, as RFC 9110 allows.
    if (asked := request.headers.get("range")) and (match := _RANGE.fullmatch(asked.strip())) and any(match.groups()):
        start, end = match.groups()
        if start:
            first, last = int(start), min(int(end) if end else size - 1, size - 1)
        else:
            first = max(0, size - int(end))
        if first > last or first >= size:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{size}"})
        status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
    headers["Content-Length"] = str(last - first + 1)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=content_type)
    body = storage.stream(name, first, last + 1)
    return StreamingResponse(body, status_code=status, media_type=content_type, headers=headers)
